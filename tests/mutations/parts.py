"""Mistakes in what the algorithm is made of: engines and memories."""

from __future__ import annotations

from tests.mutations.mutant import Mutant

EXACT = "core/test_exactness.py::test_forward_inputs_and_rate_one_give_backprops_gradient"

MUTANTS = (
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
)
