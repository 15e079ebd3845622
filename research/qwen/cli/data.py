"""``data``: look at a file of training conversations as training will see it, or turn it into another format."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from research.qwen.cli.common import quieten
from research.qwen.errors import DataError

if TYPE_CHECKING:
    from research.qwen.text.tokenizer import QwenTokenizer
    from research.qwen.train.data import DataOptions, Dataset, Progress, Sample

MAX_LENGTH = 2048
EPILOG = """\
FILE is JSON (one array) or JSONL (one object a line) with records in the published form
  {"id": "0", "conversations": [{"from": "user", "value": "..."}, {"from": "assistant", "value": "..."}]}
as OpenAI messages
  {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], "tools": [...]}
or as Alpaca
  {"instruction": "...", "input": "...", "output": "..."}
or a MindRecord file (.mindrecord) with the columns input_ids and labels."""


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m research.qwen.cli data",
        description="Check or convert training data.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = commands.add_parser("check", help="count tokens and show a sample with what is learned of it")
    check.add_argument("file", metavar="FILE", help="data file")
    check.add_argument("--sample", type=int, default=0, metavar="N", help="the sample to show (default: 0)")
    convert = commands.add_parser(
        "convert", help="write the published form (.json, .jsonl) or tokens (.mindrecord)"
    )
    convert.add_argument("source", metavar="SRC", help="data file")
    convert.add_argument("target", metavar="OUT", help="file to write; its ending says what")
    convert.add_argument("--force", action="store_true", help="replace existing files")
    for command in (check, convert):
        command.description, command.epilog = parser.description, EPILOG
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        _add_options(command)
    return parser


def _add_options(parser: argparse.ArgumentParser) -> None:
    from research.qwen.train.rendering import DataOptions, MaskKind, SpecialsKind, TruncationKind

    parser.add_argument("--model", metavar="FOLDER", help="model whose vocabulary and window are taken")
    parser.add_argument("--vocab", help="vocabulary file qwen.tiktoken (default: beside the model)")
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help=f"tokens of a sample (default: {MAX_LENGTH}, or less if the model's window is smaller)",
    )
    for name, kinds, text in (
        ("mask", MaskKind, "what is learned: as published, or the assistant's words only"),
        (
            "specials",
            SpecialsKind,
            "control tokens in texts: as published they count, or they are plain text",
        ),
        ("truncation", TruncationKind, "longer samples: cut as published, or keep whole turns"),
    ):
        parser.add_argument(
            f"--{name}", choices=get_args(kinds), default=getattr(DataOptions, name), help=text
        )
    parser.add_argument("--system", default=DataOptions.system, help="system message where there is none")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad records out instead of stopping")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; QwenError for what the user can mend."""
    args = build_parser().parse_args(argv)
    quieten(False)
    return check(args) if args.action == "check" else convert(args)


def check(args: argparse.Namespace) -> int:
    """Print what is in a file, and one sample of it."""
    from research.qwen.train.data import open_dataset

    tokenizer, options = _tokenizer(args), _options(args)
    dataset = open_dataset(args.file, tokenizer, options, args.skip_bad)
    for line in report(dataset, options, _progress("encoding")):
        print(line)
    if not 0 <= args.sample < len(dataset):
        raise DataError(f"--sample {args.sample}: the samples are 0 to {len(dataset) - 1}")
    place = dataset.line(args.sample)
    where = f", line {place}" if place else ""
    print(f"\nsample {args.sample}{where}: what is learned stands between ⟦ and ⟧\n")
    print(marked(dataset[args.sample], tokenizer))
    return 0


def report(dataset: Dataset, options: DataOptions, progress: Progress | None = None) -> Iterator[str]:
    """Lines about a dataset: counts, lengths, what packing gains, and warnings. Encodes everything once."""
    import numpy as np

    from research.qwen.train.batches import Batches

    survey = dataset.survey(progress)
    yield f"file          {dataset.path}"
    yield f"samples       {len(dataset):,}" + (
        f" (bad records left out: {survey.skipped:,})" if survey.skipped else ""
    )
    share = survey.trained_tokens / survey.tokens
    yield f"tokens        {survey.tokens:,} an epoch, {survey.trained_tokens:,} learned ({share:.1%})"
    ranks = (0, 5, 25, 50, 75, 95, 99, 100)
    values = np.percentile(survey.lengths, ranks, method="nearest")
    yield "length        " + ", ".join(
        f"{name} {int(value):,}"
        for name, value in zip(
            ("least", "5%", "25%", "median", "75%", "95%", "99%", "most"), values, strict=True
        )
    )
    packed = Batches(dataset, 1, options.max_length, packing=True)
    plain = 1 - survey.tokens / (len(dataset) * options.max_length)
    yield (
        f"packing       {len(packed.rows):,} rows of {options.max_length:,} tokens, {packed.padding_share:.1%} padding "
        f"(one sample a row: {len(dataset):,} rows, {plain:.1%})"
    )
    for problem in dataset.problems:
        yield f"left out      {f'line {problem.line}: ' if problem.line else ''}{problem.reason}"
    for warning in survey.warnings(options):
        yield f"warning       {warning}"


def marked(sample: Sample, tokenizer: QwenTokenizer) -> str:
    """The text of a sample with the learned parts in brackets; the first token is learned by nothing."""
    learned = [label >= 0 and n > 0 for n, label in enumerate(sample.labels)]
    text = ""
    for is_learned, run in groupby(zip(learned, sample.ids, strict=True), key=lambda pair: pair[0]):
        piece = tokenizer.decode([token for _, token in run])
        text += f"⟦{piece}⟧" if is_learned else piece
    return text


def convert(args: argparse.Namespace) -> int:
    """Write a data file in another format."""
    from research.qwen.train.data import ConversationDataset, is_mindrecord, open_dataset
    from research.qwen.train.published import write_published
    from research.qwen.weights.outputs import cleanup_on_sigterm

    source, target = Path(args.source), Path(args.target)
    if target.exists() and source.exists() and target.samefile(source):
        raise DataError(f"{target} is the source itself; choose another name")
    if not is_mindrecord(target) and target.suffix not in (".json", ".jsonl"):
        raise DataError(
            f"{target}: the name must end in .json or .jsonl (published form) or .mindrecord (tokens)"
        )
    if is_mindrecord(source) and not is_mindrecord(target):
        raise DataError(f"{source} holds tokens, which cannot be told apart into conversations again")
    options = _options(args)
    dataset = open_dataset(source, _tokenizer(args), options, args.skip_bad)
    with cleanup_on_sigterm():
        if isinstance(dataset, ConversationDataset) and not is_mindrecord(target):
            count, notes = write_published(dataset, target, args.force), []
        else:
            from research.qwen.train.mindrecord import write_mindrecord

            count = write_mindrecord(dataset, target, args.force, _progress("encoding"))
            notes = dataset.survey().warnings(options)
    for note in notes or ([f"bad records left out: {dataset.skipped}"] if dataset.skipped else []):
        print(f"warning: {note}", file=sys.stderr)
    print(f"{count:,} samples written to {target}")
    return 0


def _options(args: argparse.Namespace) -> DataOptions:
    from research.qwen.train.rendering import DataOptions

    length = args.max_length
    if length is None:
        length = min(MAX_LENGTH, _window(args.model))
    return DataOptions(length, args.mask, args.specials, args.truncation, args.system)


def _window(folder: str | None) -> int:
    from research.qwen.config import QwenConfig

    return QwenConfig.from_folder(Path(folder)).seq_length if folder else MAX_LENGTH


def _tokenizer(args: argparse.Namespace) -> QwenTokenizer:
    from research.qwen.text.tokenizer import QwenTokenizer, find_vocab_file

    return QwenTokenizer(find_vocab_file(args.vocab, folder=args.model))


def _progress(label: str) -> Progress | None:
    """A bar on a terminal, for what takes longer than a moment."""
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    bar = tqdm(desc=label, unit=" samples", delay=2, leave=False)

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return show
