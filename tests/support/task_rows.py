"""Examples of the seven zero-shot tasks: own sentences under the hub's field names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def choices(*texts: str) -> dict[str, list[str]]:
    return {"text": list(texts), "label": [*"ABCDE"][: len(texts)]}


def arc(question: str, key: str, *texts: str) -> dict[str, Any]:
    return {"id": f"x {question}", "question": question, "choices": choices(*texts), "answerKey": key}


ARC = [
    arc("What falls from clouds?", "B", "Sand", "Rain", "Glass"),
    arc("What do bees make?", "A", "Honey", "Bread", "Iron", "Paper", "Salt"),
    arc("Which one is cold?", "C", "Fire", "Steam", "Ice", "Lava"),
]
# Fields that no definition uses are among them.
ROWS: dict[str, list[dict[str, Any]]] = {
    "arc_easy": ARC,
    "arc_challenge": ARC[::-1],
    "piqa": [
        {"goal": "Dry a wet shirt", "sol1": "Hang it in the sun.", "sol2": "Put it into a lake.", "label": 0},
        {"goal": "Cut bread", "sol1": "Use a spoon.", "sol2": "Use a knife with teeth.", "label": 1},
    ],
    "winogrande": [
        {"sentence": "The cup fell off the shelf as the _ was tilted.", "option1": "cup", "option2": "shelf"},
        {"sentence": "Ann thanked Eve because _ had helped.", "option1": "Ann", "option2": "Eve"},
    ],
    "openbookqa": [
        {"id": "7", "question_stem": "A plant needs", "choices": choices("light", "a hat"), "answerKey": "A"},
        {"id": "8", "question_stem": "Frogs live", "choices": choices("in ponds", "in fire"), "answerKey": "A"},
    ],
    "boolq": [
        {"passage": "Cork floats on water.", "question": "does cork float", "idx": 4, "label": 1},
        {"passage": "Lead is a heavy metal.", "question": "is lead light", "idx": 5, "label": 0},
    ],
    "hellaswag": [
        {
            "ind": 24,
            "activity_label": "Baking",
            "ctx_a": "A man mixes flour.",
            "ctx_b": "then he",
            "endings": ["adds  water [title] and stirs.", "flies [step] off.", "sleeps."],
            "label": "0",
        },
        {"activity_label": "Sport", "ctx_a": "A ball rolls.", "ctx_b": "", "endings": ["It", "He sings"], "label": "1"},
    ],
}
for row, answer in zip(ROWS["winogrande"], ("2", "2"), strict=True):
    row["answer"] = answer


def write_tasks(folder: Path, rows: dict[str, list[dict[str, Any]]] = ROWS) -> Path:
    folder.mkdir(exist_ok=True)
    for task, examples in rows.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))
    return folder
