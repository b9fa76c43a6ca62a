"""Mistakes in what is around the algorithm: several processes, bad batches, streams, baselines, the Trainer."""

from __future__ import annotations

from tests.mutations.mutant import Mutant

MUTANTS = (
    # ---- several processes, bad batches
    Mutant(
        "no all-reduce",
        "parallel/data_parallel.py",
        "        dist.all_reduce(flat, group=self._group)\n",
        "",
        ("distributed/test_data_parallel.py::test_equals_one_process_in_single_precision",),
    ),
    Mutant(
        "synchronised BatchNorm by the moments of one process",
        "engines/shared_samples.py",
        "self.rows(own)",
        "own[None]",
        ("distributed/test_data_parallel.py::test_running_statistics",),
    ),
    Mutant(
        "the spread of the processes' means left out of the variance",
        "engines/shared_samples.py",
        "(variances + (means - mean).square())",
        "variances",
        ("distributed/test_data_parallel.py::test_running_statistics",),
    ),
    Mutant(
        "gradients through a synchronised BatchNorm are means of each process",
        "weights/base.py",
        "            if self.stage.mixes_processes:\n",
        "            if False:\n",
        ("distributed/test_batch_norm.py::test_equals_one_process",),
    ),
    Mutant(
        "the derivative of a synchronised BatchNorm stops at the border of a process",
        "engines/shared_samples.py",
        "total = self.total(",
        "total = (",
        ("distributed/test_batch_norm.py::test_equals_one_process",),
    ),
    Mutant(
        "processes stop at different code steps",
        "codes/gradient.py",
        "asks=not problem.above.mixes_processes_in_code_step",
        "asks=True",
        ("distributed/test_batch_norm.py::test_processes_take_equally_many_code_steps",),
    ),
    Mutant(
        "processes averaged without their numbers of samples",
        "parallel/data_parallel.py",
        "        flat[:middle] *= samples\n",
        "        flat[:middle] *= flat[-2]\n        flat[-2] = 1.0\n",
        ("distributed/test_data_parallel.py::test_equals_one_process_in_double_precision",),
    ),
    Mutant(
        "a bad batch changes running statistics",
        "guard.py",
        "            return gradients\n        buffers.restore()\n",
        "            return gradients\n",
        ("core/test_guard.py::test_skipping_is_as_if_the_batch_had_never_come",),
    ),
    Mutant(
        "NaN is not looked for",
        "guard.py",
        "    bad = total - total != 0  # what isfinite says, in fewer kernels\n",
        "    bad = total == float('inf')\n",
        ("core/test_guard.py::test_guards_look_at_every_gradient",),
    ),
    Mutant(
        "labels that were not looked at count as ignored, layers dealt out",
        "parallel/layer_parallel.py",
        "evidence += core.local_loss.evidence(step.output, step.given)",
        "pass",
        ("distributed/test_layer_parallel.py::test_labels_that_were_not_looked_at_spoil_the_batch",),
    ),
    # ---- continual learning, baselines
    Mutant(
        "forgetting measured from the last row",
        "continual/metrics.py",
        "drops = [matrix[j:last, j].max() - matrix[last, j] for j in range(last)]",
        "drops = [matrix[j:, j].max() - matrix[last, j] for j in range(last)]",
        ("continual/test_metrics.py",),
    ),
    Mutant(
        "penalty pulls away from the anchor",
        "continual/callbacks/penalty.py",
        "parameter - self.anchor[name], value=self.strength)",
        "self.anchor[name] - parameter, value=self.strength)",
        ("continual/test_penalties.py::test_the_penalty_is_added_to_the_gradient",),
    ),
    Mutant(
        "mu and gamma swapped: BCD's prices",
        "baselines/bcd.py",
        "weight = (self.rho + self.alpha) / self.gamma",
        "weight = self.gamma / (self.rho + self.alpha)",
        ("baselines/test_bcd.py::test_a_sweep_is_the_exact_minimum_of_each_block_in_turn",),
    ),
    Mutant(
        "ADMM's multiplier subtracted",
        "baselines/admm.py",
        "multiplier += self.beta * (z[top] - predicted)",
        "multiplier -= self.beta * (z[top] - predicted)",
        ("baselines/test_admm.py::test_a_sweep_is_the_exact_minimum_of_each_block_in_turn",),
    ),
    # ---- the Trainer
    Mutant(
        "a second fit's bad batches set against those of the first",
        "module.py",
        "self._seen_before, self._skipped_before = self.core.batches_seen, self.core.guard.skipped",
        "pass",
        ("module/test_nonfinite.py::test_each_fit_counts_its_own_batches",),
    ),
    Mutant(
        "the output layer of a monitored recurrent network reads the last code alone",
        "callbacks/code_monitor.py",
        "network.output_input(codes)]",
        "codes[-1]]",
        ("callbacks/test_code_monitor.py::test_a_recurrent_network",),
    ),
)
