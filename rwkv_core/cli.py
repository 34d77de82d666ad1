"""The command ``rwkv``: one verb a function, everything heavy imported where it is used."""

import argparse
import importlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rwkv_core import __version__
from rwkv_core.errors import RWKVError, did_you_mean
from rwkv_core.registry import ADAPTERS, MIXERS, RECIPES

__all__ = ["main"]

logger = logging.getLogger("rwkv")

MODEL = "checkpoint or run folder, .pth, ggmf or safetensors file, Hugging Face folder or name"


class Parser(argparse.ArgumentParser):
    """An argument parser that names the nearest verb or flag."""

    def error(self, message: str) -> NoReturn:
        """Print the message and how to get help, and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\nsee {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, or 2 for an error the message explains."""
    argv = list(sys.argv[1:] if argv is None else argv)
    _log_to_stderr()
    parser, verbs = _parser()
    if argv and not argv[0].startswith("-") and argv[0] not in verbs:
        parser.error(f"unknown command {argv[0]!r}; {did_you_mean(argv[0], verbs)}")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        verb = verbs[args.verb]
        flags = verb._option_string_actions
        verb.error(f"unknown argument {unknown[0]!r}; {did_you_mean(unknown[0], flags)}")
    if args.verb is None:
        parser.print_help()
        return 0
    try:
        status = args.run(args) or 0
        sys.stdout.flush()
        return status
    except RWKVError as error:
        return _fail(str(error))
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a folder that cannot be written
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}")
    except KeyboardInterrupt:
        return 130


def _log_to_stderr() -> None:
    """Show this package's log lines, and of other libraries only warnings."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("rwkv", "rwkv_core", "rwkv_text", "rwkv_vision", "rwkv_export"):
        package = logging.getLogger(name)
        package.handlers, package.propagate = [handler], False
        package.setLevel(logging.INFO)


def _fail(message: str) -> int:
    print(f"rwkv: error: {message}", file=sys.stderr)
    return 2


def _parser() -> tuple[Parser, dict[str, Parser]]:
    parser = Parser(
        prog="rwkv",
        description="Train RWKV models, export them to ONNX with proof, run them anywhere.",
        epilog="Begin with: rwkv demo. Then: rwkv train text --data my.txt",
    )
    parser.add_argument("--version", action="version", version=f"rwkv-toolkit {__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="COMMAND", parser_class=Parser)
    verbs: dict[str, Parser] = {}

    def verb(run: Callable[[Any], int | None], summary: str, epilog: str) -> Parser:
        name = run.__name__.lstrip("_").replace("_", "-")
        sub = subparsers.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        verbs[name] = sub
        return sub

    verb(_list, "list mixers, domains and recipes", "Plugins appear here once they are installed.")

    sub = verb(
        _info,
        "describe a checkpoint, official weights or an exported folder",
        "examples:\n  rwkv info runs/text\n  rwkv info RWKV-x070-World-0.1B.pth",
    )
    sub.add_argument("path", type=Path, help=f"{MODEL}, or an exported folder")

    sub = verb(
        _train,
        "train a recipe",
        "examples:\n"
        "  rwkv train text --data my.txt\n"
        "  rwkv train text --data notes/ --set task.dim=512 --set train.lr=6e-4\n"
        "  rwkv train text --print-config\n"
        "  rwkv train --resume runs/text",
    )
    sub.add_argument("recipe", nargs="?", help="name of a recipe; see rwkv list")
    sub.add_argument("--out", type=Path, help="folder of the run (default: runs/RECIPE)")
    sub.add_argument("--resume", type=Path, metavar="RUN", help="go on with an interrupted run")
    _add_config_flags(sub)
    sub.add_argument("--print-config", action="store_true", help="print the run as JSON and stop")
    sub.add_argument("--threads", type=int, default=0, help="torch threads (default: measured)")

    sub = verb(
        _eval,
        "evaluate a checkpoint on held-out data",
        "example:\n  rwkv eval runs/text --data other.txt",
    )
    sub.add_argument("path", type=Path, help=MODEL)
    sub.add_argument("--split", default="eval", help="part of the data: eval, or test where it is")
    sub.add_argument("--pictures", type=Path, metavar="FOLDER", help="also draw what it answers")
    _add_config_flags(sub)

    sub = verb(
        _generate,
        "continue a prompt, with a checkpoint or an exported folder",
        'example:\n  rwkv generate runs/text --prompt "The" --temperature 0.8 --top-p 0.9',
    )
    sub.add_argument("path", type=Path, help=f"{MODEL}, or an exported folder")
    sub.add_argument("--prompt", default="", help="text to continue (default: a new document)")
    sub.add_argument("--max-tokens", type=int, default=200, help="stop after this many (200)")
    sub.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest (1.0)")
    sub.add_argument(
        "--top-p", type=float, default=1.0, help="keep this share of the chances (1.0)"
    )
    sub.add_argument("--top-k", type=int, default=0, help="keep this many tokens, 0 is all (0)")
    sub.add_argument("--seed", type=int, help="the same seed writes the same text")
    sub.add_argument("--vocabulary", metavar="FILE", help="if it is not beside the model")

    sub = verb(
        _export,
        "write a checkpoint as ONNX and prove it equal",
        "example:\n  rwkv export runs/text out/\n\n"
        "The folder appears only if its graphs agree with PyTorch. Without PyTorch it runs by:\n"
        "  rwkv generate out/\n\n"
        "For browsers, and a look at it here (needs Node.js, which builds the page once):\n"
        "  rwkv export runs/text site/ --web\n"
        "  rwkv demo --web site/",
    )
    sub.add_argument("path", type=Path, help=MODEL)
    sub.add_argument("out", type=Path, help="folder to write; must not exist")
    sub.add_argument(
        "--steps", type=int, default=4096, help="recurrent steps to compare over (4096)"
    )
    sub.add_argument(
        "--quantize",
        metavar="SCHEME",
        help="fp16, int8, int8-dynamic, int4; refused if it costs much on held-out data",
    )
    sub.add_argument("--half-states", action="store_true", help="with --quantize: states in fp16")
    sub.add_argument("--data", help="held-out data for that (default: the model's own)")
    sub.add_argument(
        "--keep", action="append", default=[], help="layer to leave as it is; may be repeated"
    )
    sub.add_argument(
        "--mobile",
        action="store_true",
        help="for phones: onnxruntime's own format, operators that NNAPI and CoreML have",
    )
    sub.add_argument(
        "--web",
        action="store_true",
        help="with a page around it: FOLDER is then for browsers, on any static server",
    )
    sub.add_argument(
        "--lane", default="scan",
        help="what recurrences are made of: scan, linear_attention, chunk or triangle (scan)",
    )  # fmt: skip
    sub.add_argument(
        "--profile", action="append", default=[],
        help="add a graph: genai, transformers or embeddings (README of export); may be repeated",
    )  # fmt: skip

    sub = verb(
        _verify,
        "check an exported folder again, without PyTorch",
        "example:\n  rwkv verify out/\n\n"
        "Every file's hash, and the answers that PyTorch gave when the folder was written.",
    )
    sub.add_argument("path", type=Path, help="an exported folder")

    sub = verb(
        _run,
        "run an exported folder on a prompt or on pictures",
        "examples:\n  rwkv run out/ The weather\n  rwkv run digits/ scan.png photo.jpg\n\n"
        "rwkv generate has the settings of sampling.",
    )
    sub.add_argument("path", type=Path, help="an exported folder")
    sub.add_argument("inputs", nargs="*", help="a prompt, or files of pictures")
    sub.add_argument("--max-tokens", type=int, default=200, help="of a text (200)")

    sub = verb(
        _bench,
        "measure how fast an exported folder is here",
        "example:\n  rwkv bench out/ --threads 1\n\n"
        "Tokens or pictures a second, of the clock and of processor time; medians of 5 rounds.",
    )
    sub.add_argument("path", type=Path, help="an exported folder")
    sub.add_argument("--tokens", type=int, default=64, help="decoded per round (64)")
    sub.add_argument("--prompt", type=int, default=256, help="length of the prompt read (256)")
    sub.add_argument("--threads", type=int, default=0, help="of onnxruntime (all but one)")

    sub = verb(
        _convert,
        "write a language model in another format",
        "examples:\n"
        "  rwkv convert RWKV-x070-World-0.1B.pth model/ --to safetensors\n"
        "  rwkv convert runs/text model.pth --to official\n\n"
        "official is a .pth under BlinkDL's names; hf a folder as fla (RWKV-7, RWKV-6) or\n"
        "transformers (RWKV-4) name it; safetensors a checkpoint folder that every verb takes.\n"
        "Tensors keep their dtypes and their bits; only those of quantised files become float32.",
    )
    sub.add_argument("path", metavar="in", type=Path, help=MODEL)
    sub.add_argument("out", type=Path, help="file or folder to write; must not exist")
    sub.add_argument("--to", required=True, choices=["official", "hf", "safetensors"])

    sub = verb(
        _demo,
        "train, export, verify and run a model in about four minutes",
        "Twice: a language model on CPython's own reference, a classifier of digits.\n"
        "No network, but for npm where --web builds its page the first time.\n\n"
        "examples:\n  rwkv demo\n  rwkv demo --web\n  rwkv demo --web site/",
    )
    sub.add_argument(
        "--out", type=Path, help="folder (the first free of runs/demo, runs/demo-2, …)"
    )
    sub.add_argument("--seconds", type=float, default=95.0, help="aim of the training time (95)")
    sub.add_argument("--mixer", default="rwkv7", help="RWKV generation (rwkv7)")
    sub.add_argument(
        "--web", nargs="?", const=True, type=Path, metavar="FOLDER",
        help="show both in a page at the end; with a folder of rwkv export --web, only show that",
    )  # fmt: skip
    sub.add_argument(
        "--port", type=int, default=8000, help="of the page; 0 takes a free one (8000)"
    )

    sub = verb(
        _build_native,
        "compile the native CPU ops for this machine",
        "Optional: without them the ops run as torch operations, several times slower. Needs a\n"
        "C++ compiler (CXX, c++, g++ or clang++), takes seconds, and keeps the result in a cache.",
    )
    sub.add_argument("--force", action="store_true", help="compile even if the cache has them")
    sub.add_argument("--if-possible", action="store_true", help="stay quiet, never fail")

    verb(_doctor, "report what is installed and what would be used", "")
    return parser, verbs


def _add_config_flags(sub: Parser) -> None:
    sub.add_argument("--data", help="the task's data: a file or folder (short for --set task.data)")
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=VALUE",
        help="change a field, such as train.lr=3e-4 or task.dim=512; may be repeated",
    )


def _configured(config: Any, args: argparse.Namespace) -> Any:
    from rwkv_core.config import override

    for assignment in [*([f"task.data={args.data}"] if args.data else []), *args.set]:
        config = override(config, assignment)
    return config


def _list(args: argparse.Namespace) -> None:
    for registry in (MIXERS, ADAPTERS, RECIPES):
        print(f"{registry.kind}s")
        for name in registry:
            print(f"  {name:<12} {registry.origin(name)}")


def _info(args: argparse.Namespace) -> None:
    if (args.path / "manifest.json").exists():
        runtime = importlib.import_module("rwkv_export.runtime").load(args.path)
        print(f"domain      {runtime.manifest.adapter}")
        for name, value in runtime.metadata.items():
            print(f"{name:<11} {value}")
        for name, graph in runtime.graphs.items():
            size = (args.path / graph.file).stat().st_size
            print(f"graph       {name}: {graph.file}, {size:,} bytes, opset {graph.opset}")
            for tensor in (*graph.inputs, *graph.state):
                print(f"            {tensor.name} {tensor.dtype}{list(tensor.shape)}")
        return
    from rwkv_core import checkpoint, formats
    from rwkv_core.config import to_dict

    path = formats.resolve(args.path)
    if formats.is_foreign(path):
        from rwkv_core.formats.report import lines

        for name, value in lines(formats.describe(path), checkpoint.foreign_config):
            print(f"{name:<11} {value}")
        return
    model: Any = checkpoint.load(args.path)
    print(f"folder      {checkpoint.find(args.path)}")
    print(f"domain      {model.adapter}")
    print(f"parameters  {sum(p.numel() for p in model.parameters()):,}")
    if hasattr(model, "init_state"):
        packed = model.init_state(1).packed()
        print(f"state       {sum(t.nbytes for t in packed.values()):,} bytes per sequence")
    for name, value in to_dict(model.config).items():
        print(f"{name:<11} {value}")


def _train(args: argparse.Namespace) -> int:
    from rwkv_core.config import override
    from rwkv_core.train import TrainConfig, train
    from rwkv_core.train.threads import probe_threads

    if args.resume:
        path = args.resume / "run.json"
        if not path.is_file():
            raise RWKVError(f"{args.resume} holds no run to resume: no {path.name}")
        try:
            values = json.loads(path.read_text())
        except ValueError as error:
            raise RWKVError(f"{path} is damaged: {error}") from error
        config, out = TrainConfig.from_dict(values), args.resume
    elif args.recipe:
        config, out = RECIPES[args.recipe](), args.out or Path("runs") / args.recipe
    else:
        raise RWKVError(f"which recipe? registered: {', '.join(RECIPES)}")
    config = _configured(config, args)
    if args.threads:
        config = override(config, f"train.threads={args.threads}")
    if args.print_config:
        print(json.dumps(config.to_dict(), indent=2))
        return 0
    if not config.train.threads:
        threads, seconds = probe_threads(config)
        logger.info("%d threads, about %.2f s a step", threads, seconds)
        config = override(config, f"train.threads={threads}")
    result = train(config, out, resume=bool(args.resume))
    for name, value in result.metrics.items():
        print(f"{name:<16} {value:.4f}")
    print(f"{'checkpoint':<16} {result.run_dir}")
    return 128 + result.stopped_by if result.stopped_by else 0


def _eval(args: argparse.Namespace) -> None:
    from rwkv_core import checkpoint
    from rwkv_core.train import TrainConfig, evaluate

    model: Any = checkpoint.load(args.path)
    config = _configured(TrainConfig(adapter=model.adapter, task=model.config), args)
    adapter = ADAPTERS[model.adapter]
    if args.pictures and not hasattr(adapter, "draw"):
        raise RWKVError(f"the domain {model.adapter!r} draws no pictures; leave out --pictures")
    for name, value in evaluate(model, config.task, args.split).items():
        print(f"{name:<16} {value:.4f}")
    if args.pictures:
        for path in adapter.draw(model, config.task, args.split, args.pictures):
            print(f"{'picture':<16} {path}")


def _generate(args: argparse.Namespace) -> None:
    if (args.path / "manifest.json").exists():
        model = importlib.import_module("rwkv_export.runtime").load(args.path)
    else:
        from rwkv_core import checkpoint

        model = checkpoint.load(args.path)
        if not hasattr(model, "generate"):
            raise RWKVError(f"a model of the domain {model.adapter!r} does not generate text")
    pieces = model.generate(
        args.prompt,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
        vocabulary=args.vocabulary,
        stream=True,
    )
    print(args.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _export(args: argparse.Namespace) -> None:
    from rwkv_core import checkpoint

    exporter = importlib.import_module("rwkv_export")
    steps = [n for n in (1, 16, 256) if n < args.steps] + [args.steps]
    if args.mobile and args.quantize:
        raise RWKVError("--mobile and --quantize do not go together; choose one")
    if args.web and (args.mobile or args.lane != "scan" or args.profile):
        raise RWKVError("--web chooses the graphs itself: leave out --mobile, --lane and --profile")
    model = checkpoint.load(args.path)
    heldout = importlib.import_module("rwkv_export.heldout")
    data = heldout.held_out(model, args.data) if args.quantize else None
    if args.web:
        web = importlib.import_module("rwkv_export.web")
        with web.site(args.out) as folder:
            whole = exporter.export(model, folder / web.WHOLE, steps=steps, lane="web")
            print(f"{args.out}: {whole.bytes:,} bytes, worst disagreement {whole.worst:.2g}")
            if args.quantize:
                _quantize(args, data, whole, folder / args.quantize)
            web.assign(folder, args.quantize)
        print(f"to look at it: rwkv demo --web {args.out}")
        return
    if not args.quantize:
        lane = "mobile" if args.mobile else args.lane
        report = exporter.export(model, args.out, steps=steps, lane=lane, profiles=args.profile)
        print(f"{report.folder}: {report.bytes:,} bytes, worst disagreement {report.worst:.2g}")
        return
    if args.out.exists():
        raise RWKVError(f"{args.out} exists already; remove it or choose another folder")
    with tempfile.TemporaryDirectory() as folder:
        whole = exporter.export(
            model, Path(folder) / "whole", steps=steps, lane=args.lane, profiles=args.profile
        )
        _quantize(args, data, whole, args.out)


def _quantize(args: argparse.Namespace, held_out: Any, whole: Any, out: Path) -> None:
    data, labels = held_out
    made = importlib.import_module("rwkv_export").compress(
        whole.folder, out, args.quantize, data,
        labels=labels, keep=args.keep, half_states=args.half_states,
    )  # fmt: skip
    print(f"{args.out}: {made.bytes:,} bytes instead of {whole.bytes:,}")
    quality = made.quality
    print(
        f"{made.matrices} matrices in {args.quantize}: KL {quality.kl:.2g}, perplexity × "
        f"{quality.perplexity_ratio:.4f}, top-1 agreement {quality.top1:.2%}, greedy "
        f"{quality.greedy:.2%}, worst logit {quality.worst_logit:.2g}"
    )


def _verify(args: argparse.Namespace) -> None:
    runtime = importlib.import_module("rwkv_export.runtime").load(args.path)
    reference = importlib.import_module("rwkv_export.reference")
    parity = json.loads((args.path / "parity.json").read_text())
    print(f"files       {len(runtime.graphs) + len(runtime.manifest.files)} as they were written")
    for graph, row in reference.check(runtime).items():
        print(
            f"graph       {graph}: {row['calls']} calls, worst {row['worst']:.2g} of the largest "
            f"value, allowed {row['bound']:.2g}"
        )
    made = parity["versions"]
    print(f"written by  {', '.join(f'{name} {made[name]}' for name in made)}")
    print(f"checked by  onnxruntime {importlib.import_module('onnxruntime').__version__}")


def _run(args: argparse.Namespace) -> None:
    runtime = importlib.import_module("rwkv_export.runtime").load(args.path)
    if hasattr(ADAPTERS[runtime.manifest.adapter], "generate"):
        prompt = " ".join(args.inputs)
        print(prompt, end="", flush=True)
        for piece in runtime.generate(prompt, max_tokens=args.max_tokens, stream=True):
            print(piece, end="", flush=True)
        print()
        return
    if not args.inputs:
        raise RWKVError(f"a model of the domain {runtime.manifest.adapter!r} needs inputs to read")
    for path, prediction in zip(args.inputs, runtime.predict(args.inputs), strict=True):
        label = getattr(prediction, "label", prediction)
        sure = getattr(prediction, "confidence", None)
        print(f"{path}  {label}" + (f"  {100 * sure:.1f} %" if sure is not None else ""))


def _bench(args: argparse.Namespace) -> None:
    runtime = importlib.import_module("rwkv_export.runtime").load(args.path, threads=args.threads)
    bench = importlib.import_module("rwkv_export.bench")
    print(f"{'graph':<12} {'at once':>8} {'per second':>12} {'per CPU second':>15}")
    for speed in bench.measure(runtime, tokens=args.tokens, prompt=args.prompt):
        at_once = speed.tokens if speed.name != "step" else 1
        print(
            f"{speed.name:<12} {at_once:>8} {speed.per_second:>12.1f} {speed.per_cpu_second:>15.1f}"
        )


def _convert(args: argparse.Namespace) -> None:
    from rwkv_core.formats.convert import convert

    for note in convert(args.path, args.out, args.to):
        print(f"note        {note}")
    print(f"{args.out}: written")


def _demo(args: argparse.Namespace) -> int | None:
    if isinstance(args.web, Path):
        return importlib.import_module("rwkv_export.web").serve(args.web, args.port)
    demo = importlib.import_module("rwkv_export.demo")
    out, n = args.out or Path("runs/demo"), 1
    while args.out is None and out.exists():
        n += 1
        out = Path(f"runs/demo-{n}")
    if args.web:
        return demo.run_with_page(out, seconds=args.seconds, mixer=args.mixer, port=args.port)
    return demo.run(out, seconds=args.seconds, mixer=args.mixer)


def _build_native(args: argparse.Namespace) -> None:
    from rwkv_core.ops.native import build, library

    try:
        built = build.build(force=args.force)
        library.forget()
        isa = library.loaded().isa
    except (RWKVError, OSError) as error:
        if not args.if_possible:
            raise
        reason = str(error).partition("\n")[0]
        logger.info("native ops: not built; the torch forms are used (%s)", reason)
        return
    if built.seconds:
        print(f"native ops    compiled with {built.compiler} in {built.seconds:.1f} s")
    elif not args.if_possible:
        print("native ops    in the cache already; --force compiles them again")
    if built.seconds or not args.if_possible:
        print(f"{'library':<13} {built.path}")
        print(f"{'used here':<13} {isa} of {', '.join(build.variants())}")


def _doctor(args: argparse.Namespace) -> None:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    print(f"rwkv-toolkit  {__version__}")
    print(f"Python        {platform.python_version()} on {platform.machine()}")
    print(f"cores         {os.cpu_count()}")
    needed = ("torch", "numpy", "safetensors", "timm", "torchvision", "onnx", "onnxscript")
    optional = ("onnxruntime", "tqdm", "matplotlib", "scikit-learn")
    vocabularies = ("tokenizers", "pyrwkv-tokenizer")
    missing = []
    for name in (*needed, *optional, *vocabularies):
        try:
            print(f"{name:<13} {version(name)}")
        except PackageNotFoundError:
            print(f"{name:<13} missing")
            missing.append(name)
    if "torch" not in missing:
        import torch

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        print(f"accelerator   {device}")
        from rwkv_core.ops.native import library

        x = torch.empty(0)
        reason = library.why_not(x)
        print(f"native ops    {reason or f'{library.loaded().isa}, {library.loaded().path}'}")
        for op in ("wkv4", "wkv6", "wkv7", "bi_wkv", "bi_wkv6"):
            module = importlib.import_module(f"rwkv_core.ops.{op}")
            auto, why = module.TORCH_FORM, f"native: {reason}"
            if "native" not in module.IMPLS:
                why = "it has no native form"
            elif reason is None:
                auto, why = "native", "on CPU in fp32"
            print(f"op {op:<10} {', '.join(module.IMPLS)}; auto is {auto} ({why})")
    else:
        print("Exported folders run without torch; training and export need it.")


if __name__ == "__main__":
    sys.exit(main())
