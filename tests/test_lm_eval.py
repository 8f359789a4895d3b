# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""lm-eval's runs of three modes: their commands, and their results as one table."""

import json
import subprocess
import sys
import time
from pathlib import Path

import compare_modes
import psutil
import pytest
import result_table
import write_needles
from needle.tasks import TASKS

FOLDER = Path(compare_modes.__file__).parent
MODES = result_table.MODES


def write_run(folder, scores, *, group=None, hashes="same"):
    """What lm-eval leaves: means and, beside them, what each question got.

    scores: {task: {metric: the questions' scores}}
    """
    folder.mkdir(parents=True)
    results = {}
    for task, metrics in scores.items():
        results[task] = {"alias": task, "4096,none": -1.0, "sample_len": 3}
        lines = []
        for metric, answers in metrics.items():
            results[task] |= {
                f"{metric},none": sum(answers) / len(answers),
                f"{metric}_stderr,none": "N/A",
            }
            lines += [{"filter": "none", metric: answer} for answer in answers]
        text = "".join(json.dumps({"doc_id": i, **line}) + "\n" for i, line in enumerate(lines))
        (folder / f"samples_{task}_2026.jsonl").write_text(text)
    run = {
        "results": results,
        "configs": dict.fromkeys(scores),
        "group_subtasks": {group: list(scores)} if group else {},
        "task_hashes": dict.fromkeys(scores, hashes),
    }
    (folder / "results_2026.json").write_text(json.dumps(run))


def table(folder, checkpoint="GSAI-ML/LLaDA-1.5"):
    text = result_table.render(checkpoint, result_table.read_results(folder))
    *lines, blank, note = text.splitlines()
    assert (blank, note) == ("", result_table.NOTE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_has_groups_and_tasks_by_length_beside_the_paper(tmp_path):
    scores = {"niah": {"4096": [1, 1], "8192": [1, 0]}, "vt": {"4096": [0.5, 1], "8192": [0, 0.5]}}
    worse = {"niah": {"4096": [1, 0], "8192": [1, 0]}, "vt": {"4096": [0.5, 1], "8192": [0, 0.5]}}
    for mode, answers in zip(MODES, (scores, worse, scores), strict=True):
        write_run(tmp_path / mode / "model", answers, group="ruler")
    head, _, *rows = table(tmp_path)
    assert head == ["task", "", "questions", *MODES, "paper: dense", "paper: SparseD"]
    same = "87.5, +0.0 ± 0.0"
    assert rows[0] == ["ruler", "4096", "4", "87.5", "62.5, -25.0 ± 49.0", same, "90.5", "90.9"]
    assert rows[1][:4] == ["ruler", "8192", "4", "37.5"]
    assert rows[1][-2:] == ["60.7", "62.4"]
    assert [row[:2] for row in rows[2:]] == [
        ["niah", "4096"],
        ["niah", "8192"],
        ["vt", "4096"],
        ["vt", "8192"],
    ]
    assert rows[2][3:] == ["100.0", "50.0, -50.0 ± 98.0", "100.0, +0.0 ± 0.0", "-", "-"]
    assert {row[-1] for row in table(tmp_path, "my/needle")[2:]} == {"-"}


def test_of_two_names_for_one_score_the_shared_one_is_shown(tmp_path):
    write_run(tmp_path / "exact", {"hotpotqa": {"score": [0.25], "qa_f1_score": [0.25]}})
    _, _, *rows = table(tmp_path)
    assert rows == [["hotpotqa", "score", "1", "25.0", "-", "-"]]


def test_filters_of_one_metric_are_rows_of_their_own(tmp_path):
    write_run(tmp_path / "exact", {"gsm8k": {"exact_match": [1, 0]}})
    path = tmp_path / "exact/results_2026.json"
    run = json.loads(path.read_text())
    run["results"]["gsm8k"]["exact_match,strict"] = 0.25
    path.write_text(json.dumps(run))
    lines = [{"doc_id": i, "filter": "strict", "exact_match": 0} for i in range(4)]
    with (tmp_path / "exact/samples_gsm8k_2026.jsonl").open("a") as samples:
        samples.writelines(json.dumps(line) + "\n" for line in lines)
    rows = [row[1:4] for row in table(tmp_path)[2:]]
    assert rows == [["exact_match", "2", "50.0"], ["exact_match, strict", "4", "25.0"]]


def test_other_questions_are_not_compared(tmp_path):
    write_run(tmp_path / "exact", {"vt": {"512": [1, 0]}})
    write_run(tmp_path / "sparse", {"vt": {"512": [1, 0]}}, hashes="other")
    with pytest.raises(ValueError, match="vt: other questions were asked"):
        table(tmp_path)


def test_a_mode_that_lacks_a_task_and_a_folder_without_results(tmp_path):
    with pytest.raises(FileNotFoundError, match="no results in"):
        table(tmp_path)
    write_run(tmp_path / "exact", {"vt": {"512": [1, 0]}, "cwe": {"512": [1, 1]}})
    write_run(tmp_path / "reused", {"vt": {"512": [1, 1]}})
    _, _, vt, cwe = table(tmp_path)
    assert (vt[4], cwe[4]) == ("100.0, +50.0 ± 98.0", "-")


def parsed(*args):
    return compare_modes.parser().parse_args(["some/model", "--tasks", "ruler", *args])


@pytest.mark.parametrize("mode", MODES)
def test_modes_differ_in_what_their_requests_hold(mode):
    args = parsed("--all", '{"steps": 64}', "--sparse", '{"sparsed_block_size": 32}')
    command = compare_modes.lm_eval_command(args, mode, "http://host:1")
    request = json.loads(command[command.index("--gen_kwargs") + 1])
    more = {"sparsed_block_size": 32} if mode == "sparse" else {}
    assert request == {
        "temperature": 0,
        "vllm_xargs": {
            "steps": 64,
            "use_sparsed": int(mode == "sparse"),
            "kv_reuse": int(mode == "reused"),
            **more,
        },
    }
    model = json.loads(command[command.index("--model_args") + 1])
    assert (model["model"], model["base_url"]) == ("some/model", "http://host:1/v1/completions")
    assert command[command.index("--output_path") + 1] == f"lm_eval_results/{mode}"


def test_lengths_canvas_and_limit_reach_lm_eval():
    args = parsed("--lengths", "4096", "8192", "--canvas", "64", "--limit", "5", "--no-chat")
    command = compare_modes.lm_eval_command(args, "exact", "http://host:1")
    metadata = json.loads(command[command.index("--metadata") + 1])
    assert metadata == {"max_seq_lengths": [4096, 8192], "tokenizer": "some/model"}
    assert json.loads(command[command.index("--gen_kwargs") + 1])["max_gen_toks"] == 64
    assert command[command.index("--limit") + 1] == "5"
    assert "--apply_chat_template" not in command


def test_one_server_lets_requests_reuse_and_does_not_by_default():
    command = compare_modes.serve_command(parsed("--serve-args", "--max-model-len 9000"))
    assert command[:3] == ["vllm", "serve", "some/model"]
    assert command[-2:] == ["--max-model-len", "9000"]
    config = json.loads(command[command.index("--additional-config") + 1])
    assert config == {"reuse": {"by_default": 0}}


def test_a_missing_command_and_a_missing_server_are_told_before_anything_runs(tmp_path):
    def run(*args):
        script = [sys.executable, FOLDER / "compare_modes.py", "some/model", "--tasks", "vt"]
        ended = subprocess.run([*script, *args], capture_output=True, text=True, cwd=tmp_path)
        assert ended.returncode
        return ended.stderr

    assert "no command nowhere" in run("--lm-eval", "nowhere")
    here = ("--lm-eval", sys.executable, "--url", "http://127.0.0.1:9")
    assert run(*here).startswith("No server at http://127.0.0.1:9")
    assert "argument --sparse" in run(*here, "--sparse", "3")


def test_a_server_that_was_started_ends_with_the_script(tmp_path):
    """Also where the script is terminated: here while it waits for a server that never answers."""
    vllm = tmp_path / "vllm"
    vllm.write_text("#!/bin/sh\necho $$ > pid\nexec sleep 600\n")
    vllm.chmod(0o755)
    command = [sys.executable, FOLDER / "compare_modes.py", "some/model", "--tasks", "vt"]
    command += ["--lm-eval", sys.executable, "--vllm", vllm, "--port", "9"]
    script = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    pid = tmp_path / "pid"
    while not (pid.exists() and pid.read_text().strip()):
        assert script.poll() is None
        time.sleep(0.05)
    script.terminate()
    assert "terminated" in script.communicate(timeout=60)[1]
    assert not psutil.pid_exists(int(pid.read_text()))


@pytest.mark.parametrize("layout", write_needles.LAYOUTS)
def test_the_shipped_questions_have_the_fields_that_the_script_writes(layout):
    name = "needle.jsonl" if layout == "plain" else f"needle_{layout}.jsonl"
    lines = [json.loads(line) for line in (FOLDER / name).read_text().splitlines()]
    fields = next(write_needles.questions(layout, [96], samples=1)).keys()
    assert all(line.keys() == fields for line in lines)
    assert {line.get("task") or line["dataset"] for line in lines} == TASKS.keys()


def test_in_ruler_s_layout_every_output_is_in_the_text():
    for line in (FOLDER / "needle_ruler.jsonl").read_text().splitlines():
        question = json.loads(line)
        assert question["outputs"]
        assert all(output in question["input"] for output in question["outputs"])


def test_in_a_multiple_choice_four_answers_differ_and_one_is_in_the_text():
    for line in (FOLDER / "needle_choices.jsonl").read_text().splitlines():
        question = json.loads(line)
        right = question["choices"][question["label"]]
        assert len({*question["choices"]}) == 4
        assert all(word in question["text"] for word in right.replace(",", "").strip(".").split())
