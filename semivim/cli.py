"""The command `semivim`: publish a training run, label an image."""

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence

from semivim.inference import load_model, predict
from semivim.utils.hub import publish
from semivim.utils.parser import COUNT, Parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand; any mistake of the user's or failure of the Hub is one line and status 2.

    Args:
        argv: Words after `semivim`; None takes the command line's.
    """
    parser = Parser(prog="semivim", description="Publish a training run, label an image.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_publish(commands.add_parser("publish", help="upload a run's best teacher to the Hub and check it"))
    _add_predict(commands.add_parser("predict", help="print the top-k labels of an image file"))
    args = parser.parse_args(argv)
    run: Callable[[Namespace], list[str]] = args.run
    try:
        lines = run(args)
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def _add_publish(parser: Parser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", help="run folder of train_ssl.py")
    parser.add_argument("--repo", required=True, metavar="ORG/NAME", help="repository, made if it does not exist")
    parser.add_argument("--tag", help="name for this version, for hf-hub:ORG/NAME@TAG")
    parser.add_argument("--private", action="store_true", help="publish to a private repository")
    parser.add_argument("--dry-run", action="store_true", help="check the run and print the card; send nothing")
    parser.set_defaults(run=_publish)


def _publish(args: Namespace) -> list[str]:
    done = publish(args.run_dir, args.repo, tag=args.tag, private=args.private, dry_run=args.dry_run)
    files = [f"  {name} ({size} bytes)" for name, size in done.files.items()]
    if args.dry_run:
        return [f"would publish to {done.url}:", *files, "", done.card]
    source = f"hf-hub:{args.repo}" + (f"@{args.tag}" if args.tag else "")
    return [
        f"published to {done.url}, commit {done.commit}:",
        *files,
        f'downloaded again, logits bit for bit the same: timm.create_model("{source}", pretrained=True)',
    ]


def _add_predict(parser: Parser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="image file")
    parser.add_argument("--model", required=True, metavar="NAME", help="timm name, hf-hub:ORG/NAME, local-dir:RUN_DIR")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--pretrained", action="store_true", help="the pretrained weights of a timm name")
    weights.add_argument("--checkpoint", metavar="FILE", help="weights for a timm name, or a training checkpoint")
    parser.add_argument("--num-classes", type=COUNT, metavar="N", help="number of classes of --checkpoint")
    parser.add_argument("--topk", type=COUNT, default=5, metavar="K", help="labels to print")
    parser.set_defaults(run=_predict)


def _predict(args: Namespace) -> list[str]:
    model = load_model(args.model, args.pretrained, args.checkpoint, args.num_classes)
    return [f"{100 * share:6.2f} %  {label}" for label, share in predict(model, args.image, args.topk)]
