"""Losses of semi-supervised training."""

from semivim.loss.adaptive_threshold import freematch_threshold, softmatch_weight
from semivim.loss.class_prior import (
    adjust_logits,
    histogram_entropy,
    labelled_prior,
    prior_divergence,
    update_prior,
)
from semivim.loss.pseudo_label import confidence_and_pseudo, keep_mask, labelled_loss, unlabelled_loss

__all__ = [
    "adjust_logits",
    "confidence_and_pseudo",
    "freematch_threshold",
    "histogram_entropy",
    "keep_mask",
    "labelled_loss",
    "labelled_prior",
    "prior_divergence",
    "softmatch_weight",
    "unlabelled_loss",
    "update_prior",
]
