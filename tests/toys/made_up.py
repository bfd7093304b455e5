"""Reports of comparisons that were never made."""

from peftcore_lab.reports.trials import ComparisonReport, Trial

TOTAL = 1_000_000


def trial(label: str, score: float, trainable: int, seed: int = 0, metric: str = "accuracy", **changed) -> Trial:
    curve = [(10, 0.9 * score), (20, score)]
    values = {
        "label": label,
        "method": "full" if label == "full" else "lora",
        "options": {"rank": 8, "target": "a\"b'c<i>"},
        "seed": seed,
        "learning_rate": 1e-3,
        "trainable": trainable,
        "total": TOTAL,
        "before": {metric: 0.25},
        "after": {metric: score, "loss": 1.25},
        "curve": curve,
        "losses": [(10, 1.5), (20, 1.25)],
        "seconds_per_step": 0.1 + trainable / TOTAL,
        "peak_memory": 10**9 + 1000 * trainable,
        "file_size": 4 * trainable,
        "folder": f"runs/{seed}",
    }
    return Trial(**{**values, **changed})


def report(*trials: Trial, metric: str = "accuracy", greater: bool = True, **changed) -> ComparisonReport:
    values = {
        "model": "models/tiny-encoder",
        "task": "text-classification",
        "data": "texts.csv",
        "train_size": 800,
        "held_out_size": 400,
        "training": {"steps": 20, "epochs": None, "batch_size": 16, "accumulate": 2, "learning_rate": 1e-3},
        "seconds": 4210.0,
    }
    return ComparisonReport(metric=metric, greater=greater, trials=trials, **{**values, **changed})


def seeds(label: str, score: float, trainable: int) -> list[Trial]:
    return [trial(label, score + shift, trainable, seed) for seed, shift in enumerate((-0.01, 0.01))]
