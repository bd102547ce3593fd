import pytest

from semivim.flags.imbalance_flags import add_imbalance_flags, rule_kwargs
from semivim.flags.model_flags import add_ema_flags
from semivim.flags.parser import Parser
from semivim.flags.ssl_flags import add_semi_supervised_flags
from semivim.task.pseudo_label_rule import PseudoLabelRule


def parse(words, check=True):
    parser = Parser(prog="train", allow_abbrev=False)
    add_ema_flags(parser)
    add_semi_supervised_flags(parser)
    add_imbalance_flags(parser)
    args = parser.parse_args(["--labels-per-class", "4", *words.split()])
    if check:
        parser.check(args)
    return args


def test_defaults_are_the_plain_rule():
    assert rule_kwargs(parse(""), 100) == {
        "debias": 0.0, "tau": 0.0, "pseudo_prior": "none", "soft": False, "threshold": 0.7,
        "threshold_mode": "fixed", "momentum": 0.99,
    }  # fmt: skip
    assert parse("").posthoc_debias == "none"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--debias-pseudo -1", "argument --debias-pseudo: -1 is not"),
        ("--logit-adjust-tau nan", "argument --logit-adjust-tau: nan is not"),
        ("--prior-momentum 1", "argument --prior-momentum: 1 is not"),
        ("--posthoc-tau 0", "argument --posthoc-tau: 0 is not"),
        ("--pseudo-prior uniform", "argument --pseudo-prior: invalid choice"),
        ("--debias-pseudo 1 --logit-adjust-tau 1 --pseudo-prior labeled", "correct the same bias: give one"),
        ("--logit-adjust-tau 1 --posthoc-debias labeled", "which --logit-adjust-tau has removed already"),
        ("--pseudo-prior estimated", "--pseudo-prior is read only with --logit-adjust-tau, got estimated"),
        ("--prior-momentum 0.9", "--prior-momentum is read only with --debias-pseudo, --pseudo-prior estimated or"),
        ("--threshold-mode softmatch --threshold 0.9", "--threshold is read only with --threshold-mode fixed, got 0.9"),
        ("--posthoc-tau 2", "--posthoc-tau is read only with --posthoc-debias, got 2"),
    ],
)
def test_wrong_flag_is_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as error:
        parse(words)
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said


@pytest.mark.parametrize(
    "words",
    [
        "--ssl-method supervised --logit-adjust-tau 1 --posthoc-debias unlabeled",
        "--debias-pseudo 1 --logit-adjust-tau 1",
        "--debias-pseudo 1 --threshold-mode freematch --prior-momentum 0.9",
        "--logit-adjust-tau 1 --pseudo-prior estimated --no-soft-pseudo-labels --pseudo-mixup ss",
        "--posthoc-debias labeled --posthoc-tau 0.5",
    ],
)
def test_what_goes_together_is_taken_and_makes_a_rule(words):
    PseudoLabelRule(3, [3, 2, 1], **rule_kwargs(parse(words), 10))


@pytest.mark.parametrize(
    ("words", "unused"),
    [
        (
            "--debias-pseudo 1 --soft-pseudo-labels --prior-momentum 0.9 --threshold 0.9",
            "--threshold, --debias-pseudo, --soft-pseudo-labels, --prior-momentum",
        ),
        ("--threshold-mode freematch --threshold 0.9", "--threshold, --threshold-mode"),
        ("--pseudo-prior estimated --logit-adjust-tau 1", "--pseudo-prior"),
        ("--pseudo-prior labeled", "--pseudo-prior"),
        ("--lyap-gamma 5 --no-soft-pseudo-labels", "--lyap-gamma, --soft-pseudo-labels"),
    ],
)
def test_training_on_labels_alone_names_the_flags_of_pseudo_labels_in_one_line(words, unused, caplog):
    args = parse(f"--ssl-method supervised {words}")
    assert caplog.messages == [f"--ssl-method supervised leaves unused: {unused}"]
    rule = PseudoLabelRule(3, [3, 2, 1], **rule_kwargs(args, 10))
    assert (rule.state, rule.prior, rule.tau) == ({}, None, args.logit_adjust_tau)


def test_estimated_prior_trains_on_soft_labels_unless_told_otherwise_and_long_runs_remember_longer():
    words = "--logit-adjust-tau 1 --pseudo-prior"
    assert rule_kwargs(parse(f"{words} estimated"), 10)["soft"]
    assert not rule_kwargs(parse(f"{words} estimated --no-soft-pseudo-labels"), 10)["soft"]
    assert not rule_kwargs(parse(f"{words} labeled"), 10)["soft"]
    assert rule_kwargs(parse("--soft-pseudo-labels"), 10)["soft"]
    assert rule_kwargs(parse(""), 5000)["momentum"] == 0.999
    assert rule_kwargs(parse("--debias-pseudo 1 --prior-momentum 0.5"), 5000)["momentum"] == 0.5
