"""The token rounding study: its arms, its records, its report."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "scripts"))

import study_report  # noqa: E402
import study_token_rounding  # noqa: E402
from study_arms import STUDIES, Arm  # noqa: E402
from study_token_rounding import Job, Records, pending  # noqa: E402

from sonicmoe_titan.check import check_run  # noqa: E402
from sonicmoe_titan.toml_config import load_config  # noqa: E402

TOKEN_CHOICE = Arm("topk", 16, 2, 128, 4)
NEAREST = Arm("nearest", 16, 2, 128, 4)


def record(arm: Arm, seed: int, losses: list[float], **changes: object) -> dict:
    return {
        "study": "cpu",
        "arm": arm.name,
        "seed": seed,
        "tokens": 4000,
        "steps": 4,
        "step_tokens": 1000,
        "validation_steps": [1, 2, 4],
        "validation_losses": losses,
        "validation_loss": losses[-1],
        "rows_added": 0.01,
        "rows_dropped": 0.02,
        "padding_waste": 0.0,
        "tokens_per_s": 5000.0,
        "parameters": 2_000_000,
        "active_parameters": 600_000,
        "corpus": "python_stdlib",
        "corpus_key": "python_stdlib-0",
        "corpus_tokens": 10_000,
        "device": "cpu",
        "versions": {"torch": "2.14.1"},
        "commit": "abcdef0",
        "date": "2026-01-01",
        **changes,
    }


class TestArms:
    @pytest.mark.parametrize(
        ("name", "rows", "microbatch"),
        [
            ("nearest-e128k2-tile128-ratio4", 512, 32768),
            ("nearest-e128k2-tile128-ratio2", 256, 16384),
            ("nearest-e128k2-tile128-ratio1", 128, 8192),
            ("nearest-e128k2-tile64-ratio8", 512, 32768),
            ("down-e64k4-tile128-ratio4", 512, 8192),
            ("score_stochastic-e16k2-tile64-ratio1", 64, 512),
        ],
    )
    def test_microbatch_gives_an_expert_so_many_tiles(
        self, name: str, rows: int, microbatch: int
    ) -> None:
        arm = Arm.parse(name)
        assert arm.name == name
        assert arm.rows_per_expert == rows == arm.microbatch_tokens() * arm.top_k / arm.num_experts
        assert arm.microbatch_tokens() == microbatch

    @pytest.mark.parametrize(
        "name", ["nearest", "nearest-e64-tile8-ratio4", "drop-e4k2-tile1-ratio1"]
    )
    def test_a_name_of_no_arm_is_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match="expected"):
            Arm.parse(name)

    @pytest.mark.parametrize("name", STUDIES)
    def test_every_arm_is_a_run_of_the_same_steps_and_validation(self, name: str) -> None:
        study = STUDIES[name]
        for arm in (arm for group in study.groups.values() for arm in group):
            words = study_token_rounding.option_words(study.run_options(arm, 3, study.tokens))
            config = load_config(study.config, words)
            check_run(config, num_processes=1)
            training, model = config.training, config.model
            assert training.local_batch_size * training.seq_len == arm.microbatch_tokens()
            assert training.global_batch_size * training.seq_len == study.step_tokens
            assert training.steps * study.step_tokens == study.tokens
            held_out = config.validator.steps * training.local_batch_size * training.seq_len
            assert held_out == study.validation_tokens
            assert training.steps % config.validator.freq == 0  # the last step is validated
            assert model.router == ("topk" if arm.routing == "topk" else "token_rounding")
            if arm.routing != "topk":
                assert (model.rounding, model.rounding_tile) == (arm.routing, arm.tile)
            assert config.debug.seed == config.dataloader.seed == 3

    def test_what_does_not_divide_is_refused(self) -> None:
        study = STUDIES["cpu"]
        with pytest.raises(ValueError, match="no whole number of sequences of 128"):
            study.run_options(Arm("nearest", 16, 2, 24, 1), 1, study.tokens)
        with pytest.raises(ValueError, match="K does not divide"):
            Arm("nearest", 16, 3, 128, 1).microbatch_tokens()
        with pytest.raises(ValueError, match="--tokens 5000: expected a multiple of 24576"):
            study.run_options(NEAREST, 1, 5000)


class TestRecords:
    def test_runs_with_a_record_are_left_out(self, tmp_path: Path) -> None:
        jobs = [Job("cpu", arm, seed, 4000) for seed in (1, 2) for arm in (TOKEN_CHOICE, NEAREST)]
        records = Records(tmp_path / "deep" / "records.json")
        assert pending(jobs, records.read()) == jobs
        records.add(record(NEAREST, 1, [5.0, 4.0, 3.0]))
        records.add(record(TOKEN_CHOICE, 2, [5.0, 4.0, 3.0], tokens=8000))  # another budget
        assert pending(jobs, Records(records.path).read()) == [jobs[0], *jobs[2:]]
        assert [path.name for path in records.path.parent.iterdir()] == ["records.json"]

    def test_a_killed_study_keeps_its_records_and_goes_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The runs are replaced, the study around them is real."""
        done = []

        def train(job: Job, options: dict, work: Path, slot: int, timeout_s: float) -> bool:
            if len(done) == 2:
                raise KeyboardInterrupt
            done.append(job)
            return True

        def summarise(job: Job, run: object, seconds: float) -> dict:
            numbers = {"validation_ppl": 20.0, "tokens_per_s": 1.0}
            return record(job.arm, job.seed, [5.0, 4.0, 3.0], tokens=job.tokens, **numbers)

        monkeypatch.setattr(study_token_rounding, "train", train)
        monkeypatch.setattr(study_token_rounding, "summarise", summarise)
        monkeypatch.setattr(study_token_rounding, "read_run", lambda folder: None)
        monkeypatch.setattr(study_token_rounding, "prepare_corpus", lambda *_: {})
        words = ["study", "cpu", "--arms", "main", "--seeds", "1", "2", "--tokens", "24576"]
        words += ["--records", str(tmp_path / "r.json"), "--work", str(tmp_path / "work")]
        monkeypatch.setattr(sys, "argv", [*words, "--docs", str(tmp_path / "docs")])
        with pytest.raises(KeyboardInterrupt):
            study_token_rounding.main()
        assert len(Records(tmp_path / "r.json").read()) == 2
        first, done = done, []
        for _ in range(3):
            try:
                study_token_rounding.main()
                break
            except KeyboardInterrupt:
                first, done = first + done, []
        jobs = first + done
        assert len(jobs) == len(set(jobs)) == len(Records(tmp_path / "r.json").read()) == 8
        assert (tmp_path / "docs" / "token_rounding.md").is_file()

    def test_no_run_starts_that_would_not_end_in_time(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(study_token_rounding, "prepare_corpus", lambda *_: {})
        words = ["study", "cpu", "--arms", "main", "--seeds", "1", "--seconds", "0"]
        words += ["--records", str(tmp_path / "r.json"), "--work", str(tmp_path / "work")]
        monkeypatch.setattr(sys, "argv", [*words, "--docs", str(tmp_path / "docs")])
        study_token_rounding.main()
        assert capsys.readouterr().out.count("no time left") == 4

    def test_more_than_four_readings_of_the_corpus_are_refused(self) -> None:
        study = STUDIES["cpu"]
        options = {"dataloader.max_bytes": 1_000_000, "tokenizer.train_bytes": 200_000}
        found = study_token_rounding.prepare_corpus(study, options, 1000)
        assert found["corpus_tokens"] > 100_000
        with pytest.raises(ValueError, match="give at most 4 times as many"):
            too_many = 4 * found["corpus_tokens"] + 1
            study_token_rounding.prepare_corpus(study, options, too_many)


class TestReport:
    RECORDS = (
        record(TOKEN_CHOICE, 1, [6.0, 4.0, 3.0]),
        record(TOKEN_CHOICE, 2, [6.0, 4.2, 3.2]),
        record(NEAREST, 1, [6.0, 4.0, 3.0 + math.log(1.01)]),
        record(NEAREST, 2, [6.0, 4.2, 3.2 + math.log(1.03)]),
    )

    def test_differences_are_of_the_same_seed(self, tmp_path: Path) -> None:
        study_report.write_report(list(self.RECORDS), tmp_path)
        text = (tmp_path / "token_rounding.md").read_text()
        (line,) = [line for line in text.splitlines() if line.startswith("| rounding, nearest")]
        cells = [cell.strip() for cell in line.split("|")]
        assert cells[2:5] == ["16, 2", "128 x 4", "2"]
        # 1% and 3%: mean 2, deviation 1.414, t of one degree of freedom 12.71
        assert cells[6] == "+2.00% ± 12.71"
        assert cells[7] == "-0.13%, -0.15%"  # 15.92 and 13.10 against 15.94 and 13.12
        assert cells[8] == "1.0%, 2.0%"

    def test_a_lone_seed_has_no_interval(self) -> None:
        mean, half = study_report.interval([0.5])
        assert mean == 0.5 and math.isnan(half)

    def test_written_text_stays_and_tables_are_replaced(self, tmp_path: Path) -> None:
        document = tmp_path / "token_rounding.md"
        document.write_text("# Title\n\nbefore\n<!-- begin cpu -->\nold\n<!-- end cpu -->\nafter\n")
        gpu = record(NEAREST, 1, [6.0, 5.0, 4.0], study="h100", device="H100")
        for _ in range(2):
            written = study_report.write_report([*self.RECORDS, gpu], tmp_path)
            text = document.read_text()
            assert text.startswith("# Title\n\nbefore\n<!-- begin cpu -->\n4 runs of 4k tokens")
            assert "old" not in text
            assert text.count("<!-- begin h100 -->") == text.count("\nafter\n") == 1
        for path in written:
            assert path.stat().st_size > 0
        shown = [line for line in text.splitlines() if line.startswith("![")]
        assert len(shown) == 3  # the H100's lone arm has no token choice to differ from

    def test_budgets_and_corpora_are_not_mixed(self) -> None:
        longer = record(NEAREST, 1, [6.0, 5.0, 4.0], tokens=8000)
        elsewhere = record(NEAREST, 1, [6.0, 5.0, 4.0], corpus_key="python_stdlib-1")
        groups = study_report.by_study([*self.RECORDS, longer, elsewhere])
        counts = {name: len(group) for name, group in groups.items()}
        assert counts == {"cpu": 4, "cpu_8k": 1, "cpu_4k": 1}

    def test_runs_on_two_kinds_of_hopper_are_of_one_study(self) -> None:
        names = ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA B200")
        runs = [record(NEAREST, seed, [6.0, 5.0, 4.0], device=d) for seed, d in enumerate(names)]
        assert [len(group) for group in study_report.by_study(runs).values()] == [2, 1]
        assert study_report.devices(runs[:2]) == "NVIDIA H100 80GB HBM3 and NVIDIA H200"


def test_committed_records_make_the_committed_tables(tmp_path: Path) -> None:
    records = json.loads(study_token_rounding.RECORDS.read_text())
    document = tmp_path / "token_rounding.md"
    committed = (REPOSITORY / "docs" / "token_rounding.md").read_text()
    document.write_text(committed)
    study_report.write_report(records, tmp_path)
    assert document.read_text() == committed


@pytest.mark.slow
def test_a_run_of_the_study_leaves_a_whole_record(tmp_path: Path) -> None:
    words = [sys.executable, str(REPOSITORY / "scripts" / "study_token_rounding.py"), "cpu"]
    words += ["--arms", "nearest-e16k2-tile128-ratio1", "--seeds", "1", "--tokens", "24576"]
    words += ["--records", str(tmp_path / "r.json"), "--work", str(tmp_path / "work")]
    words += ["--docs", str(tmp_path), "--set", "model.num_layers=2"]
    subprocess.run(words, check=True, cwd=REPOSITORY)
    (one,) = Records(tmp_path / "r.json").read()
    assert one["validation_steps"] == list(range(1, 7)) and one["steps"] == 6
    assert one["validation_loss"] < one["validation_losses"][0]
    # 2 layers of 16 experts, attention, norms, router, and 1024 tied embeddings of 128
    layer = 16 * 3 * 128 * 64 + 4 * 128**2 + 2 * 32 + 2 * 128 + 128 * 16
    assert one["parameters"] == 2 * layer + 128 + 1024 * 128
    assert one["rows_dropped"] > 0 and one["padding_waste"] == 0
    assert "NaN" not in (tmp_path / "r.json").read_text()
