"""The classifier of WindowKV's tasks on sentences that it was not trained on."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "tools" / "task_kind"))
import train  # noqa: E402

from kvern.task_kind import task_kind  # noqa: E402

DOCUMENT = "The mill stood on the hill. It was built of oak, and its sails could be seen from the sea.\n" * 100


def test_nine_of_ten_held_out_prompts_are_judged_right():
    documents = train.sections(train.HERE / "documents.txt")["held out"]
    assert train.measure("held out", train.labelled(train.HERE / "held_out.txt", documents, seed=2)) > 0.9


@pytest.mark.parametrize("question", ["Who built the mill?", "What is the name of the miller?", "Where does the road lead?"])
def test_a_question_is_found_at_both_ends_of_a_long_text(question):
    assert task_kind(f"{question}\n\n{DOCUMENT}") == task_kind(f"{DOCUMENT}\n{question}\nAnswer:") == "localisation"


def test_a_pattern_to_follow_is_aggregation_though_its_parts_are_questions():
    examples = "".join(f"Question: who is number {i}?\nType: person\n" for i in range(4))
    assert task_kind(examples + "Question: where is it?\nType:") == "aggregation"


@pytest.mark.parametrize("text", ["", " \n", "?", DOCUMENT, "\x00" * 2000, "a" * 100_000])
def test_any_text_is_judged(text):
    assert task_kind(text) in ("localisation", "aggregation")
