"""Mistakes in the algorithm: objective, code step, weight step."""

from __future__ import annotations

from tests.mutations.mutant import Mutant

CODE_STEP = "core/test_code_step.py::test_the_sweep_descends_the_objective"
WEIGHT_STEP = "core/test_weight_step.py::test_each_stage_descends_its_own_problem_and_nothing_else"

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
)
