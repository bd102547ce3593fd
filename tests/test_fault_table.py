"""Where each kind of dead end is tested: an index that names tests by file and function."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent

FAULTS = {
    "strided and tied weights": "runs/test_checkpoint.py::test_strided_and_tied_weights_are_saved_as_what_they_are",
    "a size for a network of convolutions": (
        "flags/test_model_flags.py::test_a_network_of_convolutions_takes_images_of_any_size"
    ),
    "SSMixup without a Vim": "flags/test_model_flags.py::test_ssmixup_needs_a_vim",
    "a killed loader process": ("utils/test_process_faults.py::test_a_killed_loader_process_ends_the_run_in_one_line"),
    "fewer images than labels asked for": (
        "data/test_label_split.py::test_a_class_of_few_images_gives_all_of_them_and_is_named"
    ),
    "a heap and no split flag": "flags/test_open_data.py::test_all_labelled_images_and_a_heap_need_no_split_flag",
    "no folders of splits": "flags/test_open_data.py::test_a_flat_folder_holds_out_its_validation_images",
    "tables of labels": "flags/test_open_data.py::test_a_table_labels_a_folder_without_classes",
    "fewer classes than labels printed": "test_inference.py::test_five_labels_or_all_of_fewer",
    "an ASCII terminal": "test_cli.py::test_predict_prints_to_an_ascii_terminal",
    "huge originals": (
        "data/test_sources_images.py::test_a_huge_jpeg_is_shrunk_while_it_is_decoded_and_its_warning_names_it"
    ),
    "a slow first batch": "runs/test_run_log.py::test_a_slow_first_batch_is_not_silent",
    "timm's own scripts": "test_timm_script.py::test_a_script_finds_the_models_and_its_own_words",
    "80 columns": "runs/test_run_log.py::test_the_bar_is_readable_and_evaluations_stay_on_screen",
    "STL-10": "data/test_sources.py::test_stl10_brings_its_unlabelled_images",
    "labels of text": "data/test_sources.py::test_hugging_face_labels_of_text_become_classes",
    "a rank that hangs": (
        "flags/test_model_flags.py::test_a_process_that_hangs_is_waited_for_as_long_as_the_flag_says"
    ),
    "figures of one rank": "runs/test_progress.py::test_figures_are_averaged_over_the_ranks",
    "a failing Hub": "flags/test_model_flags.py::test_a_hub_that_fails_is_one_line_soon",
    "another method only": "flags/test_ssl_flags.py::test_what_only_another_method_reads_is_named_in_one_line",
}


@pytest.mark.parametrize("place", FAULTS.values(), ids=FAULTS)
def test_the_test_of_each_fault_is_there(place):
    file, _, name = place.partition("::")
    functions = [node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if hasattr(node, "name")]
    assert name in functions
