"""Where each kind of fault found by use is tested: an index that names tests by file and function."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent

# What a foreign file, a full disk, a signal or a kill may do.
SECURITY_AND_LOST_WORK = {
    "names of files inside a checkpoint": [
        "runs/test_checkpoint.py::test_history_of_a_foreign_checkpoint_removes_nothing",
        "runs/test_run_folder.py::test_foreign_names_lead_to_no_file",
    ],
    "a flipped bit in a checkpoint or in safetensors": ["utils/test_checksum.py::test_every_flipped_bit_is_found"],
    "the newest checkpoint is damaged and an older one is good": [
        "runs/test_open_run.py::test_auto_falls_back_to_the_newest_good_checkpoint_and_says_so"
    ],
    "SIGTERM and Ctrl-C in an epoch": [
        "test_train_ssl_resume.py::test_signal_ends_a_run_after_its_update_and_it_goes_on_bit_by_bit",
        "test_train_arm_resume.py::test_sigterm_ends_a_run_after_its_update_and_it_goes_on_bit_by_bit",
        "test_train_ssl_resume.py::test_ranks_stop_at_the_same_update_if_the_first_gets_the_signal",
        "test_train_ssl_resume.py::"
        "test_ranks_stop_if_the_second_gets_it_and_their_figures_survive_a_resume_on_as_many_or_on_one",
        "utils/test_stop_signal.py::test_signal_to_the_group_leaves_loaders_and_a_second_ends_all_at_once",
    ],
    "a full disk": ["runs/test_checkpoint.py::test_full_disk_is_one_line_and_leaves_whole_files"],
    "a run that diverged": [
        "test_train_ssl_resume.py::test_diverged_run_goes_on_from_its_last_good_state",
        "runs/test_checkpoint.py::test_good_checkpoint_is_the_newest_from_which_a_step_was_taken",
    ],
    "what a killed run leaves behind": [
        "runs/test_run_folder.py::test_leftovers_of_killed_runs_are_swept_and_nothing_else"
    ],
    "control characters in foreign text": [
        "utils/test_terminal.py::test_predict_shows_labels_and_names_of_files_escaped",
        "utils/test_terminal.py::test_what_other_libraries_say_is_escaped_inside_a_program",
        "utils/test_terminal.py::test_errors_of_the_parser_are_escaped",
    ],
    "sizes in a foreign config": [
        "hub/test_model_folder.py::test_what_is_wrong_is_one_line",
        "utils/test_preprocessing.py::test_large_images_and_odd_channels_are_refused",
        "flags/test_model_flags.py::test_sizes_in_a_flag_file_are_bounded",
    ],
    "Markdown in names of classes and in a license": [
        "hub/test_model_card.py::test_foreign_text_does_nothing_in_the_card",
        "hub/test_markdown.py::test_text_makes_no_tag_and_is_shown_whole",
    ],
}

# What gave a wrong result without a word.
WRONG_RESULTS = {
    "the average of a model inside another module": [
        "utils/test_lyap_ema.py::test_parent_module_does_not_change_the_ball"
    ],
    "an optimizer that wraps another one": [
        "utils/test_lyap_ema_contract.py::test_wrapped_optimizer_is_followed",
        "utils/test_lyap_ema_contract.py::test_optimizer_without_hooks_is_refused_by_name",
    ],
    "a copy of an attached average": [
        "utils/test_lyap_ema_contract.py::test_copy_of_an_attached_average_is_detached_and_works"
    ],
    "parameters frozen after the average was made": [
        "utils/test_lyap_ema_contract.py::test_model_that_is_frozen_later_moves_only_buffers"
    ],
    "folders inside class folders, hidden files": [
        "data/test_sources.py::test_class_is_the_folder_below_the_split",
        "data/test_sources.py::test_hidden_folder_is_no_class",
        "data/test_tar_files.py::test_hidden_files_are_no_images_and_every_format_is_read",
    ],
    "other formats of images": [
        "data/test_sources.py::test_every_format_of_pillow_is_read",
        "data/test_image_files.py::test_what_is_left_out_is_counted_in_one_line",
    ],
    "transparency": [
        "utils/test_pixels.py::test_transparency_is_composed_on_white",
        "data/test_sources_images.py::test_rules_for_pixels_hold_in_joined_sources",
        "test_inference.py::test_transparency_is_composed_on_the_background_of_training",
    ],
    "12 bits in a file of 16": [
        "utils/test_pixels.py::test_max_value_is_white",
        "data/test_sources_images.py::test_little_used_range_is_said_once_for_all_processes",
    ],
    "unlabelled images that taught nothing": [
        "test_train_ssl.py::test_unlabelled_images_that_taught_nothing_are_told_at_once_and_at_the_end",
        "hub/test_model_card.py::test_unlabelled_images_that_taught_nothing_are_told",
    ],
    "a teacher that is still its first copy": [
        "flags/test_ssl_flags.py::test_every_method_has_the_same_warm_up",
        "test_train_ssl.py::test_the_better_of_student_and_teacher_is_saved_and_named",
    ],
    "groups of classes cut by the alphabet": [
        "utils/test_metrics.py::test_classes_of_equal_counts_are_in_one_group",
        "test_train_ssl.py::test_classes_are_grouped_by_all_their_training_images",
    ],
    "equal images under other names": ["data/test_duplicates.py::test_equal_content_under_other_names_is_told"],
    "a layer that is replaced, hooked or quantised": [
        "layers/test_mamba.py::test_an_adapter_of_peft_gets_gradients",
        "layers/test_mamba.py::test_hooks_fire",
        "layers/test_mamba.py::test_quantised_layers_run",
    ],
}

# What ended in a traceback or led nowhere.
DEAD_ENDS = {
    "strided and tied weights": [
        "runs/test_checkpoint.py::test_strided_and_tied_weights_are_saved_as_what_they_are",
    ],
    "a size for a network of convolutions": [
        "flags/test_model_flags.py::test_a_network_of_convolutions_takes_images_of_any_size"
    ],
    "SSMixup without a Vim": ["flags/test_model_flags.py::test_ssmixup_needs_a_vim"],
    "an error in another process": [
        "utils/test_process_faults.py::test_a_killed_loader_process_ends_the_run_in_one_line",
        "utils/test_user_error.py::test_error_of_a_loader_process_is_its_last_line",
    ],
    "a damaged file of any kind": [
        "runs/test_damaged_files.py::test_a_damaged_file_is_one_line_that_names_it",
        "test_fuzz.py::test_damaged_files_are_taken_or_refused_in_one_line",
    ],
    "fewer images than labels asked for": [
        "data/test_label_split.py::test_a_class_of_few_images_gives_all_of_them_and_is_named"
    ],
    "a heap and no split flag": ["flags/test_open_data.py::test_all_labelled_images_and_a_heap_need_no_split_flag"],
    "no folders of splits": ["flags/test_open_data.py::test_a_flat_folder_holds_out_its_validation_images"],
    "tables of labels": [
        "data/test_list_files.py::test_names_and_labels_as_people_write_them",
        "flags/test_open_data.py::test_a_table_labels_a_folder_without_classes",
        "flags/test_open_data.py::test_a_list_of_validation_images_beside_a_drawn_split",
    ],
    "fewer classes than labels printed, tables of predictions": [
        "test_inference.py::test_five_labels_or_all_of_fewer",
        "test_cli.py::test_predict_takes_a_run_folder_and_prints_tables",
    ],
    "an ASCII terminal": ["test_cli.py::test_predict_prints_to_an_ascii_terminal"],
    "huge originals": [
        "data/test_sources_images.py::test_a_huge_jpeg_is_shrunk_while_it_is_decoded_and_its_warning_names_it",
        "data/test_sources_images.py::test_huge_jpegs_in_tar_files_and_shards_are_shrunk_too",
    ],
    "a slow first batch": ["runs/test_run_log.py::test_a_slow_first_batch_is_not_silent"],
    "tracing, the legacy ONNX exporter, second derivatives": [
        "models/test_export.py::test_symbolic_tracing_and_torchvisions_feature_extraction",
        "models/test_export.py::test_the_legacy_onnx_exporter_is_refused_in_one_line",
        "models/test_export.py::test_an_optimizer_of_second_order_steps",
        "models/test_export.py::test_gradients_of_each_image_by_torch_func",
    ],
    "timm's own scripts": [
        "test_timm_script.py::test_a_script_finds_the_models_and_its_own_words",
        "test_timm_script.py::test_timms_own_scripts_run",
    ],
    "80 columns": ["runs/test_run_log.py::test_the_bar_is_readable_and_evaluations_stay_on_screen"],
    "the arguments of ModelEmaV3": [
        "utils/test_lyap_ema_contract.py::test_decay_below_the_modes_least_decay_is_taken_as_model_ema_takes_it"
    ],
    "a loaded machine": [
        "test_train_ssl.py::test_threads_of_a_run_sleep_while_they_wait_unless_the_user_says_otherwise"
    ],
    "STL-10": ["data/test_sources.py::test_stl10_brings_its_unlabelled_images"],
    "four channels": [
        "data/test_four_channels.py::test_operations_on_colour_leave_alpha_as_it_is",
        "data/test_four_channels.py::test_operations_that_move_pixels_treat_all_channels_alike",
        "utils/test_pixels.py::test_alpha_is_kept_where_it_is_a_channel",
        "test_train_four_channels.py::test_a_saved_model_sees_images_as_in_training",
    ],
    "labels of text": ["data/test_sources.py::test_hugging_face_labels_of_text_become_classes"],
    "a rank that hangs": [
        "flags/test_model_flags.py::test_a_process_that_hangs_is_waited_for_as_long_as_the_flag_says"
    ],
    "figures of one rank": [
        "runs/test_progress.py::test_figures_are_added_over_the_ranks",
        "runs/test_progress.py::test_checkpoint_holds_the_sums_of_all_ranks_and_no_rank_counts_them_twice",
    ],
    "a failing Hub": [
        "flags/test_model_flags.py::test_a_hub_that_fails_is_one_line_soon",
        "data/test_sources.py::test_a_hugging_face_data_set_that_the_hub_does_not_give_is_one_line",
    ],
    "another method only": ["flags/test_ssl_flags.py::test_what_only_another_method_reads_is_named_in_one_line"],
}

# What timm, Semi-ViT and USB do not survive, or pass over.
FAULTS_OF_PEERS = {
    "a kill in an epoch": [
        "test_train_ssl_resume.py::test_run_killed_again_and_again_ends_as_the_unbroken_one",
        "test_train_arm_resume.py::test_run_killed_again_and_again_ends_as_the_unbroken_one",
    ],
    "a kill while writing": [
        "runs/test_checkpoint.py::test_sigkill_while_writing_never_loses_the_last_checkpoint",
        "runs/test_checkpoint.py::test_last_and_best_exist_at_every_moment",
    ],
    "a full disk": ["test_cli.py::test_what_the_disk_refuses_is_one_line"],
    "a truncated checkpoint": ["utils/test_checksum.py::test_cut_file_is_named"],
    "a missing checkpoint, a malicious pickle": [
        "runs/test_checkpoint.py::test_unreadable_and_unsafe_files_are_named",
        "utils/test_files.py::test_any_file_that_torch_cannot_read_is_one_line",
    ],
    "a truncated image": [
        "data/test_streams.py::test_unreadable_images_are_skipped_counted_and_named_once",
        "data/test_evaluation.py::test_unreadable_image_in_evaluation_is_an_error",
    ],
    "no image that can be read": ["data/test_streams.py::test_all_images_unreadable_ends_with_an_error"],
    "a decompression bomb": ["data/test_sources_images.py::test_unreadable_images_are_named"],
    "a loss that is not a number": [
        "runs/test_optimizer_step.py::test_gradient_that_is_not_finite_changes_nothing",
        "runs/test_optimizer_step.py::test_steps_skipped_in_a_row_end_the_run",
        "utils/test_lyap_ema_contract.py::test_nonfinite_student_touches_nothing",
    ],
    "a batch of which nothing is kept": ["task/test_semi_supervised.py::test_nothing_kept_trains_on_labels_only"],
    "a class without a labelled image": [
        "data/test_label_split.py::test_a_rare_class_keeps_a_label_unless_asked_otherwise",
        "data/test_label_split.py::test_messages_name_classes",
    ],
    "too few classes": ["data/test_sources.py::test_more_classes_than_the_model_has"],
    "too many classes": ["data/test_label_split.py::test_more_classes_than_the_data_set_has"],
    "a killed loader process": ["utils/test_process_faults.py::test_a_killed_loader_process_ends_the_run_in_one_line"],
    "no loader process": ["test_train_ssl.py::test_folders_unlabelled_folder_and_a_broken_image"],
    "a port in use": ["flags/test_model_flags.py::test_a_port_in_use_is_one_line"],
    "a rank that is killed": ["utils/test_process_faults.py::test_faults_of_other_processes_are_told_from_bugs"],
    "answers 401, 403 and 404 of the Hub": ["hub/test_hub_session.py::test_failure_is_one_line"],
    "a Hub that fails, hangs or cannot be reached": [
        "hub/test_hub_session.py::test_passing_fault_is_survived",
        "hub/test_hub_session.py::test_cached_copy_serves_while_the_hub_is_down",
        "hub/test_hub_session.py::test_without_network",
    ],
    "an unknown flag": ["flags/test_parser.py::test_wrong_word_is_one_line_that_names_flag_value_and_what_is_wanted"],
    "an unknown key in YAML": ["test_train_ssl.py::test_config_file_sets_defaults_and_refuses_unknown_keys"],
    "a batch of no images": ["flags/test_train_flags.py::test_wrong_value_is_refused_where_it_is_read"],
    "no folder of data": ["data/test_sources.py::test_missing_places_are_named"],
    "paths out of the root in a list": [
        "data/test_list_files.py::test_entries_that_cannot_be",
        "data/test_list_files.py::test_links_out_of_the_root_are_refused",
    ],
    "a second header in summary.csv": [
        "runs/test_run_log.py::test_rows_and_evaluations_of_an_unfinished_epoch_are_dropped"
    ],
}

TABLES = (SECURITY_AND_LOST_WORK, WRONG_RESULTS, DEAD_ENDS, FAULTS_OF_PEERS)


@cache
def functions(file):
    """Names of the functions of a file of tests."""
    return {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(
    "places", [p for table in TABLES for p in table.values()], ids=[kind for table in TABLES for kind in table]
)
def test_the_tests_of_each_fault_are_there(places):
    for place in places:
        file, _, name = place.partition("::")
        assert name in functions(file), place
