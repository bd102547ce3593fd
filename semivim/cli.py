"""The command `semivim`: convert published weights, label images, publish a training run."""

import csv
import io
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence

from semivim.convert import convert
from semivim.data import UnreadableImageError
from semivim.flags.data_flags import pixel_flags, pixel_rules
from semivim.flags.parser import COUNT, Parser
from semivim.hub.hub import publish
from semivim.hub.model_folder import pixel_rules as model_rules
from semivim.inference import find_images, load_model, predict
from semivim.utils.terminal import escape, escape_lines
from semivim.utils.user_error import UserError, did_you_mean_file, one_line, user_errors_end_the_program

Labelled = tuple[str, list[tuple[str, float]]]  # an image's path, and its labels with their probabilities


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand; a mistake of the user's or a failure of the Hub is one line and status 2.

    Args:
        argv: Words after `semivim`; None takes the command line's.
    """
    parser = Parser(prog="semivim", description="Convert published weights, label images, publish a training run.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_convert(commands.add_parser("convert", help="turn a published file into a folder that timm loads"))
    _add_predict(commands.add_parser("predict", help="print the top-k labels of image files"))
    _add_publish(commands.add_parser("publish", help="upload a run's best model to the Hub and check it"))
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error, too")
    args = parser.parse_args(argv)
    run: Callable[[Namespace], Iterator[str]] = args.run
    with user_errors_end_the_program(parser.prog, args.debug):
        for line in run(args):
            _print(line)


def _print(line: str) -> None:
    try:
        sys.stdout.write(f"{escape_lines(line)}\n")
        sys.stdout.flush()
    except OSError as error:  # a full disk, or a reader that has had enough
        raise UserError(f"cannot write to the standard output: {error.strerror}") from error


def _add_convert(parser: Parser) -> None:
    parser.add_argument("checkpoint", metavar="IN.pth", help="published checkpoint")
    parser.add_argument("folder", metavar="OUT_DIR", help="folder to create")
    parser.add_argument("--model", required=True, metavar="NAME", help="architecture, e.g. vim_tiny_patch16_224")
    parser.add_argument(
        "--entry",
        default="",
        choices=("model", "model_ema"),
        help="weights to take from a training state; not given: those whose accuracy is published",
    )
    parser.set_defaults(run=_convert)


def _convert(args: Namespace) -> Iterator[str]:
    model = convert(args.checkpoint, args.model, args.folder, args.entry)
    num_params = sum(p.numel() for p in model.parameters())
    yield (
        f"wrote {args.folder}: {args.model}, {num_params} parameters, {model.num_classes} classes; "
        "read again, its logits are bit for bit the same"
    )


def _add_publish(parser: Parser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", help="run folder of train_ssl.py or train_arm.py")
    parser.add_argument("--repo", required=True, metavar="ORG/NAME", help="repository, made if it does not exist")
    parser.add_argument("--tag", help="name for this version, for hf-hub:ORG/NAME@TAG")
    parser.add_argument("--license", metavar="ID", help="license of the weights (that of the weights trained from)")
    parser.add_argument("--private", action="store_true", help="publish to a private repository")
    parser.add_argument("--dry-run", action="store_true", help="check the run and print the card; send nothing")
    parser.set_defaults(run=_publish)


def _publish(args: Namespace) -> Iterator[str]:
    done = publish(args.run_dir, args.repo, args.tag, args.license, private=args.private, dry_run=args.dry_run)
    yield f"would publish to {done.url}:" if args.dry_run else f"published to {done.url}, commit {done.commit}:"
    for name, size in done.files.items():
        yield f"  {name} ({size} bytes)"
    if args.dry_run:
        yield f"\n{done.card}"
    else:
        source = f"hf-hub:{args.repo}" + (f"@{args.tag}" if args.tag else "")
        yield f'downloaded again, logits bit for bit the same: timm.create_model("{source}", pretrained=True)'


def _add_predict(parser: Parser) -> None:
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image file, or folder of images")
    parser.add_argument("--model", required=True, metavar="NAME", help="run folder, timm name or hf-hub:ORG/NAME")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--pretrained", action="store_true", help="the pretrained weights of a timm name")
    weights.add_argument("--checkpoint", metavar="FILE", help="weights for a timm name, or a training checkpoint")
    parser.add_argument("--num-classes", type=COUNT, help="number of classes of --checkpoint")
    parser.add_argument("--topk", type=COUNT, default=None, help="labels to print, else 5 or all of fewer")
    parser.add_argument("--format", default="text", choices=list(_FORMATS), help="of what is printed")
    pixel_flags(parser, otherwise=", else as in the model's training")
    parser.set_defaults(run=_predict)


def _predict(args: Namespace) -> Iterator[str]:
    """Label all images that can be read, then fail if one could not."""
    model = load_model(args.model, args.pretrained, args.checkpoint, args.num_classes)
    paths, rules = find_images(args.images), pixel_rules(args, model_rules(model, f"--model {args.model}"))
    unread: list[str] = []

    def labelled() -> Iterator[Labelled]:
        for path in paths:
            try:
                yield path, predict(model, path, args.topk, rules)
            except UnreadableImageError as error:
                sys.stderr.write(f"semivim: error: {escape(one_line(error) + did_you_mean_file(path))}\n")
                unread.append(path)

    yield from _FORMATS[args.format](labelled(), len(paths))
    if unread:
        raise SystemExit(2)


def _as_text(labelled: Iterator[Labelled], num_images: int) -> Iterator[str]:
    for path, labels in labelled:
        if num_images > 1:
            yield f"{escape(path)}:"
        for label, share in labels:
            yield f"{100 * share:6.2f} %  {escape(label)}"


def _as_csv(labelled: Iterator[Labelled], _: int) -> Iterator[str]:
    """A row for each label of an image, the most probable first."""
    yield "image,rank,label,probability"
    for path, labels in labelled:
        for rank, (label, share) in enumerate(labels, start=1):
            row = io.StringIO()
            csv.writer(row, lineterminator="").writerow([escape(path), rank, escape(label), f"{share:.6g}"])
            yield row.getvalue()


def _as_json(labelled: Iterator[Labelled], _: int) -> Iterator[str]:
    """A list with an object for each image, which is printed as soon as it is labelled."""
    before = "["
    for path, labels in labelled:
        shares = [{"label": label, "probability": round(share, 9)} for label, share in labels]
        yield f"{before}{json.dumps({'image': path, 'labels': shares})}"
        before = ","
    yield "]" if before == "," else "[]"


_FORMATS = {"text": _as_text, "csv": _as_csv, "json": _as_json}
