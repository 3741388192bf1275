"""One of several processes of a TRL run; what it drew and was told goes to rank<r>.json: MODEL FOLDER."""

from __future__ import annotations

import json
import os
import pathlib
import sys

from tests.integrations.test_trl import make, scripted


def main() -> None:
    model, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    seen: list[list[int]] = []
    trainer, log = make(model, folder / "run", scripted(seen), steps=3, per_device_train_batch_size=4)
    trainer.train()
    told = [outcomes.rewards.tolist() for outcomes in log.outcomes]
    (folder / f"rank{os.environ['RANK']}.json").write_text(
        json.dumps({"rows": log.rows, "weights": log.weights, "seen": seen, "told": told})
    )


if __name__ == "__main__":
    main()
