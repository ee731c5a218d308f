# SPDX-License-Identifier: Apache-2.0
"""The workloads of LongSpec's paper (arXiv:2502.17421, section 4): where their texts are, and what is asked of each.

Five tasks of LongBench (arXiv:2308.14508) with its own instructions, and the 30 problems of AIME 2024, whose answers
are long. The texts come from the Hugging Face hub at a fixed revision, or from a folder with a file for each.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A field of a record in an instruction. Other braces, as code has them, are text.
_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Workload:
    name: str
    title: str
    repository: str  # a dataset on the Hugging Face hub
    revision: str
    local_file: str  # in a folder of the user's
    instruction: str  # {field} stands for a field of a record
    # Of the repository, with `local_file` in its folder data; None where the repository is read as a whole.
    archive: str | None = None
    # Whether prompts are short by nature.
    short: bool = False

    @property
    def fields(self) -> list[str]:
        return _FIELD.findall(self.instruction)

    def ask(self, record: Mapping[str, Any]) -> str:
        """The prompt of a record.

        Raises:
            KeyError: the record lacks a field.
        """
        return _FIELD.sub(lambda match: str(record[match[1]]), self.instruction)


def _longbench(name: str, title: str, task: str, instruction: str) -> Workload:
    revision = "5e628be450b7e67fb7ae6e201bd6d8f7056f7672"
    return Workload(name, title, "zai-org/LongBench", revision, f"{task}.jsonl", instruction, archive="data.zip")


WORKLOADS = {
    workload.name: workload
    for workload in (
        _longbench(
            "govreport",
            "GovReport",
            "gov_report",
            "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n"
            "{context}\n\nNow, write a one-page summary of the report.\n\nSummary:",
        ),
        _longbench(
            "qmsum",
            "QMSum",
            "qmsum",
            "You are given a meeting transcript and a query containing a question or instruction. Answer the query in "
            "one or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting "
            "transcript in one or more sentences.\n\nQuery: {input}\nAnswer:",
        ),
        _longbench(
            "multi_news",
            "Multi-News",
            "multi_news",
            "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\nNow, "
            "write a one-page summary of all the news.\n\nSummary:",
        ),
        _longbench("lcc", "LCC", "lcc", "Please complete the code given below. \n{context}Next line of code:\n"),
        _longbench(
            "repobench-p",
            "RepoBench-P",
            "repobench-p",
            "Please complete the code given below. \n{context}{input}Next line of code:\n",
        ),
        Workload(
            "aime24",
            "AIME 2024",
            "HuggingFaceH4/aime_2024",
            "2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
            "aime24.jsonl",
            "{problem}",
            short=True,
        ),
    )
}


def read_records(workload: Workload, folder: Path | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a workload with their places, in the order of the file.

    Args:
        folder: has the workload's `local_file`; None reads from the hub.

    Raises:
        ValueError: the texts are not there or not what they should be; one line with the way out.
    """
    records: Iterable[tuple[str, Any]]
    if folder is None:
        place = f"{workload.repository} at {workload.revision[:7]}"
        records = ((f"{place}, record {number}", each) for number, each in enumerate(_from_hub(workload), start=1))
    else:
        path = folder / workload.local_file
        if not path.is_file():
            raise ValueError(f"--workload {workload.name}: there is no {path}; {_where(workload)} and put it there")
        records = _from_file(path)
    for place, record in records:
        lacking = [name for name in workload.fields if not isinstance(record.get(name), str)]
        if lacking:
            raise ValueError(
                f"{place}: there is no text {lacking[0]!r}, which {workload.title} has: is this another file?"
            )
        yield place, record


def _from_file(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number} is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}:{number} is no JSON object")
            yield f"{path}:{number}", record


def _from_hub(workload: Workload) -> Iterable[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"--workload {workload.name} is read from the Hugging Face hub by `datasets`, which is not installed: "
            f"pip install 'vllm-longspec[bench]', or give a folder with {workload.local_file} by --workload-data"
        ) from error
    try:
        if workload.archive is None:
            return load_dataset(workload.repository, revision=workload.revision, split="train")
        # Not by the name of the repository: that asks for its loading script, which newer `datasets` do not run.
        archive = f"hf://datasets/{workload.repository}@{workload.revision}/{workload.archive}"
        return load_dataset("json", data_files=f"zip://data/{workload.local_file}::{archive}", split="train")
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"--workload {workload.name} could not be read from the Hugging Face hub ({reason}); without a network, "
            f"{_where(workload)} and give its folder by --workload-data"
        ) from error


def _where(workload: Workload) -> str:
    """How to get the texts by hand."""
    page = f"https://huggingface.co/datasets/{workload.repository}"
    if workload.archive is None:
        return f"save the records of {page} as {workload.local_file}, one JSON object a line,"
    return f"take data/{workload.local_file} out of {workload.archive} of {page}"
