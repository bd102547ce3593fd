"""Losses of semi-supervised training, and of training what a model may leave out."""

from semivim.loss.adaptive_threshold import freematch_threshold, softmatch_weight
from semivim.loss.class_prior import (
    adjust_logits,
    histogram_entropy,
    labelled_prior,
    prior_divergence,
    update_prior,
)
from semivim.loss.dynamic_tokens import distillation_loss, gate_ratio_loss, kept_token_loss, token_ratio_loss
from semivim.loss.pseudo_label import confidence_and_pseudo, keep_mask, labelled_loss, unlabelled_loss

__all__ = [
    "adjust_logits",
    "confidence_and_pseudo",
    "distillation_loss",
    "freematch_threshold",
    "gate_ratio_loss",
    "histogram_entropy",
    "keep_mask",
    "kept_token_loss",
    "labelled_loss",
    "labelled_prior",
    "prior_divergence",
    "softmatch_weight",
    "token_ratio_loss",
    "unlabelled_loss",
    "update_prior",
]
