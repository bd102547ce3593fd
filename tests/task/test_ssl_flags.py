import argparse

import pytest

from semivim.task.ssl_flags import add_semi_supervised_flags


def test_groups_defaults_and_choices(capsys):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_semi_supervised_flags(parser)
    titles = [group.title for group in parser._action_groups]
    assert titles[-4:] == ["Semi-supervised method", "Label split", "Unlabelled views", "LyapEMA"]
    args = parser.parse_args([])
    assert (args.ssl_method, args.pseudo_mixup, args.threshold) == ("lyapema", "none", 0.7)  # Semi-ViM section 5
    assert args.label_fraction is args.labels_per_class is args.imb_n1 is args.labeled_list is None
    assert [a.dest for a in parser._actions if not a.help] == []
    for flags in (["--pseudo-mixup", "cut"], ["--threshold", "1.5"], ["--unlabeled-ratio", "0"], ["--fold", "-1"]):
        with pytest.raises(SystemExit):
            parser.parse_args(flags)
        assert flags[0] in capsys.readouterr().err
