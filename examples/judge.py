# examples/judge.py: a function in verl's style that waits for a judge; its calls run at the same time
import asyncio


async def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    await asyncio.sleep(0)  # ask the judge here
    return {"score": float(solution_str.strip() == ground_truth), "data_source": data_source}


def check_row(row, where, **arguments):
    if not row["ground_truth"].strip():
        raise ValueError("ground_truth is empty")


compute_score.check_row = check_row  # gets the rows before any model is loaded
