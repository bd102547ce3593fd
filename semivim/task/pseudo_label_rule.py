"""From the weak views' logits to pseudo-labels: correction by a class prior, hard or soft targets, and the threshold.

One rule holds all that a method knows of the priors of the classes, labelled and unlabelled. Its running means move
once for each optimizer step that was taken, by sums over all batches and ranks of it; a forward pass reads them as the
step before left them.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from semivim.loss.adaptive_threshold import freematch_threshold, softmatch_weight
from semivim.loss.class_prior import adjust_logits, labelled_prior, update_prior
from semivim.loss.pseudo_label import confidence_and_pseudo, keep_mask
from semivim.utils.process_group import in_process_group

PSEUDO_PRIORS = ("none", "labeled", "estimated")
THRESHOLD_MODES = ("fixed", "freematch", "softmatch")
SUMS = ("unlabelled", "prob_sum", "label_sum", "confidence_sum", "confidence_square_sum")  # of `PseudoLabels.sums`


class PseudoLabels(NamedTuple):
    """Pseudo-labels of a batch; all without gradient."""

    confidence: Tensor  # (b,) float32, the largest class probability after correction
    pseudo: Tensor  # (b,) int64, its class
    target: Tensor  # what trains: pseudo, or with soft labels the class probabilities (b, k)
    keep: Tensor  # (b,), bool, or the weight of the row in [0, 1], float32
    sums: dict[str, Tensor]  # what `commit` and the log need, summed over the rows


class PseudoLabelRule:
    """How logits ``f`` on weak views become pseudo-labels, and how the losses adjust the student's logits.

    With ``tau`` (logit adjustment): the labelled loss takes ``f + tau log pi_l``, with ``pi_l`` the labelled prior.

    With ``debias`` (DebiasPL): labels from ``f - lambda log p``, margin ``lambda log p``, where ``p`` is the running
    mean of ``softmax(f)``, uniform at first. With ``pseudo_prior`` (logit adjustment, SimPro): labels from
    ``f + tau log pi_u``, margin ``tau log pi_u``, where ``pi_u`` is the labelled prior or the running mean of the
    adjusted probabilities, which starts there.

    Args:
        num_classes: ``k``.
        class_counts: Labelled images of each class; needed by ``tau``.
        debias: ``lambda``, 0 for none.
        tau: Strength of the logit adjustment, 0 for none.
        pseudo_prior: ``none``, ``labeled`` or ``estimated``: the prior of the unlabelled images.
        soft: Train on the corrected probabilities instead of their largest class.
        threshold: Confidence above which a row trains, with ``fixed``.
        threshold_mode: ``fixed``, ``freematch`` or ``softmatch``.
        momentum: Momentum of all running means, in [0, 1).
        device: Where logits live.

    Attributes:
        labelled_prior: ``pi_l``, ``(k,)``, uniform without ``class_counts``.
        state: The running means: ``prior`` (``p`` or ``pi_u``), of FreeMatch ``threshold`` and ``class_probs``, of
            SoftMatch ``confidence_mean`` and ``confidence_var``; only those in use.

    Raises:
        ValueError: For a choice that does not exist, a range, or options that contradict each other.

    Source: Wang et al. (arXiv:2201.01490), where the mean is that of the probabilities before correction, as the
    authors confirmed for their Algorithm 1; Menon et al. (arXiv:2007.07314); Du et al., SimPro (arXiv:2402.13505).
    """

    def __init__(
        self,
        num_classes: int,
        class_counts: Sequence[int] | None = None,
        *,
        debias: float = 0.0,
        tau: float = 0.0,
        pseudo_prior: str = "none",
        soft: bool = False,
        threshold: float = 0.7,
        threshold_mode: str = "fixed",
        momentum: float = 0.999,
        device: torch.device | None = None,
    ) -> None:
        wrong = {
            f"pseudo_prior {pseudo_prior!r} is not one of {', '.join(PSEUDO_PRIORS)}": pseudo_prior
            not in PSEUDO_PRIORS,
            f"threshold_mode {threshold_mode!r} is not one of {', '.join(THRESHOLD_MODES)}": (
                threshold_mode not in THRESHOLD_MODES
            ),
            f"threshold is {threshold}, wanted a confidence in [0, 1)": not 0.0 <= threshold < 1.0,
            f"momentum is {momentum}, wanted a number in [0, 1)": not 0.0 <= momentum < 1.0,
            f"debias is {debias} and tau {tau}, wanted 0 or more": debias < 0.0 or tau < 0.0,
            f"debias {debias} and pseudo_prior {pseudo_prior!r} would correct twice, wanted one": (
                debias > 0.0 and pseudo_prior != "none"
            ),
            f"tau {tau} needs class_counts, got None": tau > 0.0 and class_counts is None,
            f"pseudo_prior {pseudo_prior!r} needs tau above 0, got {tau}": pseudo_prior != "none" and not tau,
        }
        if message := next((message for message, holds in wrong.items() if holds), None):
            raise ValueError(message)
        self.tau, self.debias, self.pseudo_prior, self.soft = tau, debias, pseudo_prior, soft
        self.threshold, self.threshold_mode, self.momentum = threshold, threshold_mode, momentum
        self.labelled_prior = labelled_prior([1] * num_classes if class_counts is None else class_counts).to(device)
        uniform = torch.full((num_classes,), 1.0 / num_classes, device=device)
        self.state: dict[str, Tensor] = {}
        if debias or pseudo_prior == "estimated":
            self.state["prior"] = uniform if debias else self.labelled_prior
        if threshold_mode == "freematch":
            self.state |= {"threshold": uniform[0].clone(), "class_probs": uniform}
        elif threshold_mode == "softmatch":
            self.state |= {"confidence_mean": uniform[0].clone(), "confidence_var": torch.ones((), device=device)}

    @property
    def prior(self) -> Tensor | None:
        """``p`` of ``debias`` or ``pi_u`` of ``pseudo_prior``, ``(k,)``; None without either."""
        return self.labelled_prior if self.pseudo_prior == "labeled" else self.state.get("prior")

    def labelled_logits(self, logits: Tensor) -> Tensor:
        """The student's logits ``(b, k)`` of labelled images as the loss takes them."""
        return adjust_logits(logits, self.labelled_prior, self.tau) if self.tau else logits

    def unlabelled_logits(self, logits: Tensor) -> Tensor:
        """The student's logits ``(b, k)`` on strong views as the loss takes them."""
        return logits if self.prior is None else adjust_logits(logits, self.prior, self.debias or self.tau)

    @torch.no_grad()
    def __call__(self, logits: Tensor) -> PseudoLabels:
        """Label weak views.

        Args:
            logits: ``f``, ``(b, k)``; the softmax is taken in float32.
        """
        plain = logits.detach().float()
        corrected = plain if self.prior is None else adjust_logits(plain, self.prior, -self.debias or self.tau)
        confidence, pseudo = confidence_and_pseudo(corrected)
        sums = {
            "unlabelled": torch.tensor(float(len(plain)), device=plain.device),
            "prob_sum": plain.softmax(-1).sum(0),
        }
        if self.pseudo_prior == "estimated" or self.threshold_mode == "freematch":
            sums["label_sum"] = corrected.softmax(-1).sum(0)
        if self.threshold_mode != "fixed":
            sums |= {"confidence_sum": confidence.sum(), "confidence_square_sum": confidence.square().sum()}
        target = corrected.softmax(-1) if self.soft else pseudo
        return PseudoLabels(confidence, pseudo, target, self._keep(confidence, pseudo), sums)

    def _keep(self, confidence: Tensor, pseudo: Tensor) -> Tensor:
        state = self.state
        if self.threshold_mode == "freematch":
            return confidence > freematch_threshold(pseudo, state["threshold"], state["class_probs"])
        if self.threshold_mode == "softmatch":
            return softmatch_weight(confidence, state["confidence_mean"], state["confidence_var"])
        return keep_mask(confidence, self.threshold)

    @torch.no_grad()
    def commit(self, sums: Mapping[str, Tensor]) -> None:
        """Move the running means after an optimizer step that was taken; every rank must call this.

        Args:
            sums: ``PseudoLabels.sums`` added up over the batches of the step; others beside them are left alone.
        """
        if not self.state:
            return
        # copied: the sums over ranks are written in place, and the log counts this rank's
        total = {name: sums[name].to(torch.float32, copy=True) for name in SUMS if name in sums}
        if in_process_group():
            for value in total.values():
                dist.all_reduce(value)
        n = total["unlabelled"]
        mean = {name: value / n for name, value in total.items()}
        state, m = self.state, self.momentum
        new: dict[str, Tensor] = {}
        if "prior" in state:
            new["prior"] = update_prior(state["prior"], mean["prob_sum" if self.debias else "label_sum"], m)
        if self.threshold_mode == "freematch":
            new["threshold"] = m * state["threshold"] + (1.0 - m) * mean["confidence_sum"]
            new["class_probs"] = update_prior(state["class_probs"], mean["label_sum"], m)
        elif self.threshold_mode == "softmatch":
            spread = total["confidence_square_sum"] - total["confidence_sum"] * mean["confidence_sum"]
            var = (spread / (n - 1).clamp(min=1)).clamp(min=0)
            new["confidence_mean"] = m * state["confidence_mean"] + (1.0 - m) * mean["confidence_sum"]
            new["confidence_var"] = m * state["confidence_var"] + (1.0 - m) * var
        # where, not an if: the device is not waited for. Infinite logits of one weak view must not stay in a mean.
        self.state = {name: torch.where(value.isfinite().all(), value, state[name]) for name, value in new.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore ``state``.

        Raises:
            ValueError: If it is another rule's.
        """
        if state.keys() != self.state.keys():
            held, wanted = (", ".join(names) or "nothing" for names in (state, self.state))
            raise ValueError(
                f"running means of pseudo-labels: got {held}, wanted {wanted}; "
                "--debias-pseudo, --pseudo-prior or --threshold-mode differ"
            )
        self.state = {name: state[name].to(value.device) for name, value in self.state.items()}
