"""The deliberate mistakes that `tests/mutants.py` plants, and the tests that must catch each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
        name: What is wrong.
        file: Path below the package.
        old: Text that occurs exactly once in it.
        new: What it is replaced by.
        tests: What must fail, as pytest knows it, below ``tests/``.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def planted(self, text: str) -> str:
        """The file's text with the mistake.

        Raises:
            ValueError: If ``old`` does not occur exactly once.
        """
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"mutant {self.name!r}: its text occurs {count} times in {self.file}: {self.old!r}")
        return text.replace(self.old, self.new)


CODE_STEP = "core/test_code_step.py::test_the_sweep_descends_the_objective"
WEIGHT_STEP = "core/test_weight_step.py::test_each_stage_descends_its_own_problem_and_nothing_else"
EXACT = "core/test_exactness.py::test_forward_inputs_and_rate_one_give_backprops_gradient"

MUTANTS = (
    # ---- the algorithm
    Mutant(
        "no anchor (its target not detached, as in the official code)",
        "objective.py",
        "        return displacement\n",
        "        return None\n",
        (CODE_STEP,),
    ),
    Mutant(
        "sign of the coupling flipped in the weight step",
        "objective.py",
        "scale = self.mu / residual.shape[0]",
        "scale = -self.mu / residual.shape[0]",
        (WEIGHT_STEP,),
    ),
    Mutant(
        "weight step summed over samples, not averaged",
        "objective.py",
        "scale = self.mu / residual.shape[0]",
        "scale = self.mu",
        (WEIGHT_STEP,),
    ),
    Mutant(
        "mu forgotten in the weight step",
        "objective.py",
        "scale = self.mu / residual.shape[0]",
        "scale = self.mu.new_tensor(1.0 / residual.shape[0])",
        (WEIGHT_STEP,),
    ),
    Mutant(
        "loss multiplied by mu, not divided",
        "objective.py",
        "return loss.total_gradient() / self.mu",
        "return loss.total_gradient() * self.mu",
        (CODE_STEP,),
    ),
    Mutant(
        "code step takes the mean loss, not the sum",
        "objective.py",
        "return loss.total_gradient() / self.mu",
        "return loss.mean_gradient() / self.mu",
        ("core/test_code_step.py::test_a_samples_codes_do_not_depend_on_its_batch",),
    ),
    Mutant(
        "l1 term of codes without 1 / mu",
        "objective.py",
        "return code.sign() * (self.lambda_c / self.mu)",
        "return code.sign() * self.lambda_c",
        (CODE_STEP,),
    ),
    Mutant(
        "biases shrunk by the l1 term of weights",
        "objective.py",
        "if self.lambda_w == 0 or parameter.dim() < 2:",
        "if self.lambda_w == 0:",
        ("core/test_weight_step.py::test_lambda_w_pulls_weights_and_spares_biases",),
    ),
    Mutant(
        "codes moved from the bottom up",
        "altmin.py",
        "for level in range(len(step.codes_forward) - 1, -1, -1):",
        "for level in range(len(step.codes_forward)):",
        (CODE_STEP,),
    ),
    Mutant(
        "target above as it was before it moved",
        "altmin.py",
        "target_move=None if is_top else step.moves[level + 1],",
        "target_move=None if is_top else step.moves[level + 1] * 0,",
        (CODE_STEP,),
    ),
    Mutant(
        "forward inputs in place of moved ones",
        "network.py",
        "step.moves[index - 1] if index > 0 and moved else None,",
        "None,",
        (WEIGHT_STEP,),
    ),
    Mutant(
        "gradients left for the next batch",
        "altmin.py",
        "                    self.optimizer.step()\n        clear_gradients(self.optimizer)\n",
        "                    self.optimizer.step()\n",
        ("core/test_weight_step.py::test_gradients_add_up_and_step_clears_them",),
    ),
    Mutant(
        "target of the weight step is the forward code",
        "weights/base.py",
        "residual = live.residual(self.forward_output, self.move, self.spends)",
        "residual = live.residual(self.forward_output, torch.zeros_like(self.move), self.spends)",
        (WEIGHT_STEP,),
    ),
    Mutant(
        "signal not divided out",
        "objective.py",
        "residual.mul_(scale if signal is None else scale / signal)",
        "residual.mul_(scale)",
        ("core/test_curvature_codes.py::test_weight_gradients_do_not_follow_the_rates",),
    ),
    Mutant(
        "the loss of a step that two read is out of proportion to what the next step asks",
        "recurrent.py",
        "return term if self.signal is None else term * self.signal",
        "return term",
        ("core/test_recurrent.py::test_shares_of_a_plain_step_are_divided_out_step_by_step",),
    ),
    # ---- code solvers
    Mutant(
        "momentum of the code step swapped for its complement",
        "codes/gradient.py",
        "velocity.mul_(self.momentum).add_(gradient)",
        "velocity.mul_(1 - self.momentum).add_(gradient)",
        ("core/test_code_step.py::test_momentum_by_hand",),
    ),
    Mutant(
        "soft threshold without the rate",
        "codes/proximal.py",
        "threshold = self.lr * problem.objective.lambda_c / problem.objective.mu",
        "threshold = problem.objective.lambda_c / problem.objective.mu",
        ("core/test_proximal_codes.py::test_it_converges_to_the_lasso_solution",),
    ),
    Mutant(
        "curvature measured without the anchor",
        "codes/base.py",
        "return curvature if anchor is None else curvature + (anchor * direction).flatten(1).sum(1)",
        "return curvature",
        ("core/test_line_search.py::test_the_curvature_is_the_hessian_of_the_objective",),
    ),
    # ---- engines
    Mutant(
        "weight not transposed back",
        "engines/linear.py",
        "return product(lambda g: g @ self.module.weight, grad)",
        "return product(lambda g: g @ self.module.weight * 0.5, grad)",
        (EXACT,),
    ),
    Mutant(
        "network's output left in a graph (missing detach)",
        "losses/by_autograd.py",
        "            output = output.detach().requires_grad_()\n            scalar",
        "            output = output.requires_grad_()\n            scalar",
        ("core/test_losses.py::test_the_output_is_left_out_of_graphs",),
    ),
    Mutant(
        "a memory in triangles unfolds its second block from the first",
        "weights/triangle_statistics.py",
        "return triangles[1:], triangles[:-1]",
        "return triangles[1:], triangles[1:]",
        ("weights/test_triangle_statistics.py::test_sums_are_those_of_the_whole_matrix",),
    ),
    Mutant(
        "encode's maxima taken for those of the moved code",
        "weights/base.py",
        "self.forward_input.add_(self.input_move).detach()",
        "self.forward_input.add_(self.input_move)",
        ("core/test_state.py::test_a_freed_code_is_pooled_where_it_moved_to",),
    ),
    Mutant(
        "BatchNorm's moved input forgets the move",
        "engines/normalization.py",
        "here.knows(x + difference,",
        "here.knows(x,",
        ("core/test_weight_step.py::test_batch_norm_is_differentiated_through_its_statistics",),
    ),
    Mutant(
        "BatchNorm updated again in the weight step",
        "engines/normalization.py",
        "torch.native_batch_norm(x, norm.weight, norm.bias, None, None, True, 0.0, norm.eps)",
        "torch.native_batch_norm("
        "x, norm.weight, norm.bias, norm.running_mean, norm.running_var, True, norm.momentum, norm.eps)",
        ("core/test_weight_step.py::test_running_statistics_after_a_whole_step",),
    ),
    Mutant(
        "BatchNorm of a block updated in the weight step",
        "engines/batch_norm_state.py",
        "                norm.track_running_stats = False\n",
        "                pass\n",
        ("core/test_weight_step.py::test_running_statistics_after_a_whole_step",),
    ),
    Mutant(
        "another dropout mask in the code step",
        "engines/dropout.py",
        "return grad if at.state is None else grad * at.state",
        "return grad if at.state is None else self.module(grad)",
        ("core/test_exactness.py::test_dropout_does_not_break_exactness",),
    ),
    Mutant(
        "a block runs from the buffers that encode left",
        "engines/block_buffers.py",
        "owner._buffers[name] = _copy(buffer)  #",
        "owner._buffers[name] = _copy(owner._buffers[name])  #",
        ("core/test_exactness.py::test_buffers_that_a_block_updates_do_not_break_exactness",),
    ),
    Mutant(
        "verify compares small quantities absolutely",
        "verification.py",
        "scale = max(size, min(rounding, max(1.0, largest)), _SHARE * largest)",
        "scale = max(size, 1.0)",
        ("core/test_verification.py::test_a_planted_bug_below_a_vanishing_signal_is_found",),
    ),
    Mutant(
        "verify takes rounding for a difference",
        "verification.py",
        "scale = max(size, min(rounding, max(1.0, largest)), _SHARE * largest)",
        "scale = size",
        ("core/test_verification.py::test_rounding_is_no_difference",),
    ),
    Mutant(
        "a forward of the instance's own is overlooked",
        "engines/closed_form.py",
        'return "forward" in module.__dict__',
        "return False",
        ("engines/test_layers.py::test_a_module_with_a_forward_of_its_own_is_left_to_autograd",),
    ),
    # ---- memories
    Mutant(
        "stale memory: the inverse is not renewed",
        "weights/innovation.py",
        "        memory.statistics.renew(self._ridge)\n",
        "        if not bool(memory.statistics.inverse.any()):\n            memory.statistics.renew(self._ridge)\n",
        ("weights/test_innovation.py::test_is_backprop_preconditioned_by_second_moments",),
    ),
    Mutant(
        "a memory that does not forget",
        "weights/layer_statistics.py",
        "        decay = self._decay(forgetting, processes)\n",
        "        decay = self._decay(1.0, processes)\n",
        ("weights/test_statistics.py::test_forgetting_against_its_closed_form",),
    ),
    Mutant(
        "targets discounted and inputs not",
        "weights/layer_statistics.py",
        "A, B = self.A * decay, None if self.B is None else self.B * decay",
        "A, B = self.A.clone(), None if self.B is None else self.B * decay",
        ("weights/test_statistics.py::test_forgetting_against_its_closed_form",),
    ),
    Mutant(
        "ridge of the wrong sign",
        "weights/ridge.py",
        "return A + torch.diag_embed((ridge * A.diagonal().mean()).expand(A.shape[0]))",
        "return A - torch.diag_embed((ridge * A.diagonal().mean()).expand(A.shape[0]))",
        ("weights/test_ridge.py::test_equals_the_batch_ridge_solution",),
    ),
    Mutant(
        "a sweep over columns that reads old ones",
        "weights/bcd.py",
        "upper = A.triu() + torch.diag_embed(torch.full_like(A.diagonal(), _FLOOR))",
        "upper = torch.diag_embed(A.diagonal() + _FLOOR)",
        ("weights/test_bcd.py::test_reproduces_the_released_code",),
    ),
    # ---- several processes, bad batches
    Mutant(
        "no all-reduce",
        "strategies/data_parallel.py",
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
        "strategies/data_parallel.py",
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
    Mutant(
        "pooled code steps put back in another order of entries",
        "engines/pooling.py",
        ".permute(0, 3, 4, 1, 5, 2)",
        ".permute(0, 3, 4, 2, 5, 1)",
        ("engines/test_tiled.py",),
    ),
    Mutant(
        "equal entries of a tile judged from the last, in a compiled pooling",
        "engines/pooling.py",
        "for entry in entries[:-1]:\n            rest = torch.where(entry < largest, grad, 0)",
        "for entry in entries[:-1]:\n            rest = torch.where(entry <= largest, grad, 0)",
        ("engines/test_layers.py::test_rules_for_a_compiler_agree_with_autograd",),
    ),
)
