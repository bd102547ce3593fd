"""Losses of semi-supervised training."""

from semivim.loss.pseudo_label import confidence_and_pseudo, keep_mask, labelled_loss, unlabelled_loss

__all__ = ["confidence_and_pseudo", "keep_mask", "labelled_loss", "unlabelled_loss"]
