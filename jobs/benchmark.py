"""What a stream of tasks keeps, by method, label space and seed: Transfer, Average, Last, routing, cost.

    python jobs/benchmark.py --stream birds=DATA/birds,signs=DATA/signs --methods finetune,condu --work WORK
    python jobs/benchmark.py --protocol mtil-1 --data DATA --methods condu,condu-lora --seeds 0,1,2 --work WORK --json
    python jobs/benchmark.py --protocol b0 --increment 10 --data DATA/objects --methods sequential,rapf --work WORK

Settings come from --config and the environment (CONDU_TRAIN__STEPS=200), as for `condu-ray learn`. Everything that is
learned and measured stays in --work: killed, the same command goes on; finished, it prints at once. Accuracy matrices
are drawn into WORK/pictures. docs/accuracy.md defines every figure.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ending import job

from condu_ray import reports
from condu_ray.benchmark import increments, protocols
from condu_ray.benchmark.run import run
from condu_ray.benchmark.settings import Benchmark
from condu_ray.benchmark.stream import Stream, parse_stream
from condu_ray.benchmark.systems import METHODS, check_methods
from condu_ray.cli import INTERRUPTED
from condu_ray.engine.progress import stage
from condu_ray.errors import ConfigError


def asked(options: argparse.Namespace) -> Benchmark:
    """What the options ask for. Raises ConduError."""
    if bool(options.protocol) != bool(options.data) or bool(options.stream) == bool(options.protocol):
        raise ConfigError("one stream is needed", "give --stream NAME=PATH,..., or --protocol and --data")
    stream = parse_stream(options.stream) if options.stream else _by_name(options)
    seeds = options.seeds or (str(protocols.SEED) if options.protocol in protocols.ORDERS else "0")
    if not all(seed.isdecimal() for seed in seeds.split(",")):
        raise ConfigError(f"--seeds {seeds} are not numbers", "give whole numbers, such as 0,1,2")
    settings: dict[str, Any] = {"model": options.model, "eval_pictures": options.eval_pictures}
    return Benchmark(
        stream=stream.reversed() if options.reverse else stream,
        methods=check_methods([name for name in options.methods.split(",") if name]),
        seeds=tuple(dict.fromkeys(int(seed) for seed in seeds.split(","))),
        work=options.work.resolve(),
        options={name: value for name, value in settings.items() if value is not None},
        file=options.config,
    )


def _by_name(options: argparse.Namespace) -> Stream:
    name = options.protocol
    if increments.is_incremental(name):
        return increments.increments(name, options.data, options.increment, options.class_order)
    if name not in protocols.ORDERS:
        raise increments.unknown(name, tuple(protocols.ORDERS))
    if options.increment is not None or options.class_order is not None:
        raise ConfigError(f"--protocol {name} has no class increments", "leave --increment and --class-order out")
    return protocols.protocol(name, options.data)


@job
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stream", metavar="NAME=PATH,...", help="tasks in the order learned, as for `condu-ray learn`"
    )
    named = [*protocols.ORDERS, "b0", "b50 (any number of first classes)", *increments.RECIPES]
    parser.add_argument("--protocol", metavar="NAME", help=f"a published stream: {', '.join(named)}")
    parser.add_argument(
        "--data", metavar="FOLDER", help="the protocol's sets, or `torchvision`; for b0 the set itself, or several"
    )
    parser.add_argument("--increment", type=int, metavar="N", help="classes a session, for b0 and the like")
    parser.add_argument("--class-order", metavar="SEED|FILE", help=f"of increments [default: {increments.ORDER}]")
    parser.add_argument("--methods", required=True, help=f"of {', '.join(METHODS)}")
    parser.add_argument("--seeds", help="of splits, order of pictures and augmentation [default: 0; a protocol's own]")
    parser.add_argument("--model", help="as for `condu-ray learn`")
    parser.add_argument("--reverse", action="store_true", help="the last task first")
    parser.add_argument("--eval-pictures", type=int, help="most test pictures a task [default: 1000]")
    parser.add_argument("--config", type=Path, help="YAML file with any setting of `condu-ray learn`")
    parser.add_argument("--work", type=Path, required=True, help="folder for stores, figures and pictures")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(arguments)
    try:
        found = run(asked(options), stage)
    except KeyboardInterrupt:
        print("stopped; the same command goes on where this one ended", file=sys.stderr)
        sys.exit(INTERRUPTED)
    reports.emit(found) if options.json else reports.show_benchmark(found)


if __name__ == "__main__":
    main()
