"""Images, label splits, views and mixing for semi-supervised training."""

from semivim.data.duplicates import describe_duplicates
from semivim.data.evaluation import EvaluationLoader, LabelledBatch, sample_images
from semivim.data.label_split import LabelSplit, complete_split, draw_validation, load_split, make_split, save_split
from semivim.data.list_files import ListedImages, listed_classes, read_list, split_from_lists
from semivim.data.source_parts import check_sources, join_sources, refuse_shared, select_images
from semivim.data.sources import (
    ImageSource,
    UnreadableImageError,
    open_source,
    open_unlabelled_folder,
)
from semivim.data.ssmixup import (
    MixedBatch,
    mix_inputs,
    mix_probabilistic,
    mix_targets,
    mixing_weight,
    pair_retained,
)
from semivim.data.streams import Batch, ImageStream, StreamLoader
from semivim.data.views import View, least_side

__all__ = [
    "Batch",
    "EvaluationLoader",
    "ImageSource",
    "ImageStream",
    "LabelSplit",
    "LabelledBatch",
    "ListedImages",
    "MixedBatch",
    "StreamLoader",
    "UnreadableImageError",
    "View",
    "check_sources",
    "complete_split",
    "describe_duplicates",
    "draw_validation",
    "join_sources",
    "least_side",
    "listed_classes",
    "load_split",
    "make_split",
    "mix_inputs",
    "mix_probabilistic",
    "mix_targets",
    "mixing_weight",
    "open_source",
    "open_unlabelled_folder",
    "pair_retained",
    "read_list",
    "refuse_shared",
    "sample_images",
    "save_split",
    "select_images",
    "split_from_lists",
]
