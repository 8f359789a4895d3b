# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Any of lm-eval's generating tasks, exact, sparse and reused, from one server, as one table.

    python examples/lm_eval/compare_modes.py GSAI-ML/LLaDA-1.5 --tasks ruler --lengths 4096 8192

Starts `vllm serve`, or asks the one at --url; runs `lm_eval` once a mode; prints the table beside
the paper's numbers. Needs no package: vllm and lm_eval are commands.
"""

import argparse
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))

from result_table import MODES, read_results, render

Xargs = dict[str, Any]

START_TIMEOUT = 3600  # seconds: a checkpoint may have to be downloaded
END_TIMEOUT = 60  # seconds
REQUEST_TIMEOUT = 7200  # seconds that lm-eval waits for one answer, its turn in the queue included

MODE_XARGS: dict[str, Xargs] = {
    "exact": {"use_sparsed": 0, "kv_reuse": 0},
    "sparse": {"use_sparsed": 1, "kv_reuse": 0},
    "reused": {"use_sparsed": 0, "kv_reuse": 1},
}
assert MODE_XARGS.keys() == set(MODES)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # takes the server along
    command_line = parser()
    args = command_line.parse_args()
    if not args.table_only:
        for command in (args.lm_eval, *([] if args.url else [args.vllm])):
            if shutil.which(command) is None:
                command_line.error(
                    f"there is no command {command}; --lm-eval and --vllm name them."
                )
        evaluate(args)
    print(render(args.checkpoint, read_results(args.output)))


def evaluate(args: argparse.Namespace) -> None:
    """Ask all tasks in all modes; what was done before a failure stays in the output folder."""
    with nullcontext(args.url) if args.url else served(args) as url:
        for mode in args.modes:
            probe(url, args.checkpoint, args.canvas or 128, xargs_of(args, mode))
        for mode in args.modes:
            if subprocess.run(lm_eval_command(args, mode, url)).returncode:
                sys.exit(f"lm_eval failed ({mode}). Answers are kept: the same command goes on.")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="its name or path, for the server and the tokenizer")
    parser.add_argument("--tasks", nargs="+", required=True, help="lm-eval's names")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of RULER's prompts")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--output", type=Path, default=Path("lm_eval_results"), help="a folder")
    parser.add_argument("--table-only", action="store_true", help="print what is in --output")
    parser.add_argument("--canvas", type=int, help="tokens of an answer, in place of each task's")
    parser.add_argument(
        "--max-length",
        type=int,
        default=1 << 20,  # what is too long the server refuses
        help="cut the beginning of prompts that with their canvas are longer, without a word",
    )
    for name in ("all", *MODES):
        text = f"vllm_xargs of {name} requests"
        parser.add_argument(f"--{name}", type=json_object, default={}, metavar="JSON", help=text)
    parser.add_argument("--limit", type=int, help="questions of each task")
    parser.add_argument("--include-path", help="a folder with tasks of your own")
    parser.add_argument("--no-chat", action="store_true", help="send prompts without the template")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let lm-eval run a checkpoint's own tokenizer, such as Dream's; the server needs none",
    )
    parser.add_argument("--concurrent", type=int, default=8, help="requests at a time")
    parser.add_argument("--url", help="of a running server, http://HOST:PORT; else one is started")
    parser.add_argument("--port", type=int, default=8000, help="of the server that is started")
    parser.add_argument("--lm-eval", default="lm_eval", help="the command")
    parser.add_argument("--vllm", default="vllm", help="the command")
    parser.add_argument("--serve-args", type=shlex.split, default=[], help="for the vllm serve")
    return parser


def json_object(text: str) -> Xargs:
    """A JSON object. Raises ValueError, which argparse reports."""
    mapping = json.loads(text)
    if not isinstance(mapping, dict):
        raise ValueError
    return mapping


def xargs_of(args: argparse.Namespace, mode: str) -> Xargs:
    """The parameters of ours that the mode's requests hold."""
    return {**args.all, **MODE_XARGS[mode], **vars(args)[mode]}


def lm_eval_command(args: argparse.Namespace, mode: str, url: str) -> list[str]:
    """One run of lm-eval over all tasks.

    Requests are completions of ids: the template is applied here, so that a task may begin the
    answer (RULER's `gen_prefix`), which a server of chats would take for a finished turn.
    """
    # LongBench's tasks say temperature 1 and mean greedy: their do_sample does not reach a server.
    request: Xargs = {"temperature": 0, "vllm_xargs": xargs_of(args, mode)}
    if args.canvas:
        request["max_gen_toks"] = args.canvas
    model = {
        "model": args.checkpoint,
        "base_url": f"{url}/v1/completions",
        "tokenizer_backend": "huggingface",
        "num_concurrent": args.concurrent,
        "timeout": REQUEST_TIMEOUT,
        "max_length": args.max_length,
        "trust_remote_code": args.trust_remote_code,
    }
    command = [args.lm_eval, "run", "--model", "local-completions"]
    command += ["--model_args", json.dumps(model), "--gen_kwargs", json.dumps(request)]
    command += ["--tasks", ",".join(args.tasks), "--output_path", str(args.output / mode)]
    command += ["--log_samples", "--use_cache", str(args.output / mode / "answers")]
    if args.lengths:
        metadata = {"max_seq_lengths": args.lengths, "tokenizer": args.checkpoint}
        command += ["--metadata", json.dumps(metadata)]
    if not args.no_chat:
        command += ["--apply_chat_template"]
    if args.limit:
        command += ["--limit", str(args.limit)]
    if args.include_path:
        command += ["--include_path", args.include_path]
    return command


def serve_command(args: argparse.Namespace) -> list[str]:
    """One server for all modes: its requests may reuse keys and values, and say whether they do."""
    reuse = json.dumps({"reuse": {"by_default": 0}})
    command = [args.vllm, "serve", args.checkpoint, "--port", str(args.port)]
    return [*command, "--additional-config", reuse, *args.serve_args]


@contextmanager
def served(args: argparse.Namespace) -> Iterator[str]:
    """The URL of a server that ends with the context; its log is server.log in the output folder.

    Raises RuntimeError if it does not come up.
    """
    args.output.mkdir(parents=True, exist_ok=True)
    path, url = args.output / "server.log", f"http://127.0.0.1:{args.port}"
    with path.open("w") as log:
        server = subprocess.Popen(serve_command(args), stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_TIMEOUT
        while not _is_up(url):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"vllm serve did not come up; see {path}")
            time.sleep(1)
        yield url
    finally:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(END_TIMEOUT)
        server.kill()


def _is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def probe(url: str, model: str, canvas: int, xargs: Xargs) -> None:
    """Ask one short question, before hours are spent on many.

    Ends the program with a message if nobody answers, or with the server's if it refuses.
    """
    body = {"model": model, "prompt": "hello", "max_tokens": canvas, "vllm_xargs": xargs}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT).close()
    except urllib.error.HTTPError as error:
        sys.exit(f"The server refuses {json.dumps(xargs)}: {error.read().decode()}")
    except urllib.error.URLError as error:
        sys.exit(f"No server at {url}: {error.reason}.")


if __name__ == "__main__":
    main()
