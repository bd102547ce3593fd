"""Images, label splits, views and mixing for semi-supervised training."""

from semivim.data.duplicates import describe_duplicates
from semivim.data.evaluation import EvaluationLoader, LabelledBatch, sample_images
from semivim.data.label_split import LabelSplit, complete_split, load_split, make_split, save_split
from semivim.data.list_files import ListedImages, read_list, split_from_lists
from semivim.data.sources import (
    ImageSource,
    UnreadableImageError,
    check_sources,
    join_sources,
    open_source,
    open_unlabelled_folder,
    refuse_shared,
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
from semivim.data.views import View

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
    "join_sources",
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
    "split_from_lists",
]
