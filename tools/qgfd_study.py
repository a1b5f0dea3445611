"""Does diffusing attention help? Trains QGFD models with 0, 1 and 2 hops on one latent space, and measures them.

    python tools/qgfd_study.py runs/qgfd_image runs/qgfd_text

Each argument is a finished run of a recipe of one modality, whose adapters (encoder and decoder) all models share,
so that losses can be compared. A model that is trained already, in --folder, is not trained again. Writes tables to
stdout, JSON and a picture; docs/qgfd_study.md has the results.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np

T_QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # 97.5 %, by number of seeds
NOISES = (0.0, 0.1, 0.2, 0.4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="finished runs of one modality each")
    parser.add_argument("--hops", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-steps", type=int, default=1500, help="of training")
    parser.add_argument("--batch-size", type=int, help="of training (default: the run's)")
    parser.add_argument("--draws", type=int, default=4096, help="held-out examples, times and noises of each loss")
    parser.add_argument("--workers", type=int, default=2, help="models trained at once, on one thread each")
    parser.add_argument("--folder", type=Path, default=Path("runs/qgfd_study"), help="of the models' runs")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/qgfd_study.json"), help="JSON")
    parser.add_argument("--picture", type=Path, default=Path("docs/images/qgfd_study.png"), help="PNG")
    arguments = parser.parse_args()
    if len(arguments.seeds) not in T_QUANTILE:
        parser.error(f"--seeds has {len(arguments.seeds)}; expected {min(T_QUANTILE)} to {max(T_QUANTILE)} of them")
    if 0 not in arguments.hops:
        parser.error(f"--hops has {arguments.hops}; expected 0 among them, which the others are compared with")
    missing = [str(run) for run in arguments.runs if not (run / "config.yaml").is_file()]
    if missing:
        parser.error(f"{missing[0]} is not the folder of a run; train its recipe first")
    jobs = [(run, hops, seed) for run in arguments.runs for seed in arguments.seeds for hops in arguments.hops]
    with ThreadPoolExecutor(arguments.workers) as pool:
        training = [pool.submit(train, arguments, *job) for job in jobs]
        for future in as_completed(training):
            if future.exception() is not None:
                pool.shutdown(cancel_futures=True)
                raise future.exception()
    results = [measure(arguments, *job) for job in jobs]
    report = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
        "results": results,
    }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    for modality in dict.fromkeys(result["modality"] for result in results):
        print(f"\n{modality}\n\n{table([r for r in results if r['modality'] == modality])}")
    draw(results, arguments.picture)
    print(f"\nwritten to {arguments.output} and {arguments.picture}")


def train(arguments: argparse.Namespace, run: Path, hops: int, seed: int) -> None:
    """One model, in a process of its own."""
    folder = folder_of(arguments, run, hops, seed)
    overrides = {
        "objective.adapters_from": run,
        "backbone.steps": hops,
        "backbone.alpha": arguments.alpha,
        "training.seed": seed,
        "training.max_steps": arguments.max_steps,
        "training.output_dir": folder,
        "training.resume": "true",
        "training.overwrite": "false",
        "training.preview_every": 0,
        "sampling.evaluation_samples": 0,
    }
    if arguments.batch_size is not None:
        overrides["training.batch_size"] = arguments.batch_size
    command = [sys.executable, "-m", "fastdiff.train", str(run / "config.yaml")]
    command += [str(part) for name, value in overrides.items() for part in (f"--{name}", value)]
    print(f"training {folder}", file=sys.stderr)
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{folder}: {done.stderr.strip().splitlines()[-1]}")


def folder_of(arguments: argparse.Namespace, run: Path, hops: int, seed: int) -> Path:
    return arguments.folder / f"{run.name}_hops{hops}_seed{seed}"


def measure(arguments: argparse.Namespace, run: Path, hops: int, seed: int) -> dict:
    """Held-out losses of one model, of the averaged weights, in float32; with noise on what the denoiser sees."""
    from fastdiff.tasks.qgfd.losses import held_out_losses
    from fastdiff.tasks.qgfd.run import load_run

    loaded = load_run(folder_of(arguments, run, hops, seed), device="cpu")
    (modality,) = loaded.recipe.modalities
    held_out = loaded.source_of(modality).data.held_out
    losses = {}
    for noise in NOISES:
        parts = held_out_losses(loaded.model, modality, held_out, arguments.draws, input_noise=noise)
        losses[f"{noise:g}"] = float(parts["loss"].mean())
    print(f"measured {loaded.folder.path}", file=sys.stderr)
    return {"modality": modality, "hops": hops, "seed": seed, "step": loaded.step, "losses": losses}


def table(results: list[dict]) -> str:
    """Losses by hops: mean over seeds and 95 % interval (Student's t); and differences to no hops, seed by seed."""
    noises = list(results[0]["losses"])
    head = ["hops", "held-out loss", "minus 0 hops, seed by seed"]
    head += [f"rise with noise {noise}" for noise in noises[1:]]
    lines = ["| " + " | ".join(head) + " |", "| ---: |" + " ---: |" * (len(head) - 1)]
    plain = {r["seed"]: r for r in results if r["hops"] == 0}
    for hops in sorted({r["hops"] for r in results}):
        mine = [r for r in results if r["hops"] == hops]
        losses = [r["losses"][noises[0]] for r in mine]
        differences = [r["losses"][noises[0]] - plain[r["seed"]]["losses"][noises[0]] for r in mine]
        cells = [str(hops), interval(losses, "{:.4f}"), "" if hops == 0 else interval(differences, "{:+.4f}")]
        for noise in noises[1:]:
            cells.append(interval([100 * (r["losses"][noise] / r["losses"][noises[0]] - 1) for r in mine], "{:.1f} %"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def interval(values: list[float], form: str) -> str:
    """Mean ± half of the 95 % interval."""
    half = T_QUANTILE[len(values)] * np.std(values, ddof=1) / math.sqrt(len(values))
    return f"{form.format(np.mean(values))} ± {form.replace('+', '').format(half)}"


def draw(results: list[dict], path: Path) -> None:
    """A panel per modality: loss against the noise on the input, a line per number of hops, a thin one per seed."""
    from matplotlib.figure import Figure

    from fastdiff.visualization.figures import save_figure

    modalities = list(dict.fromkeys(result["modality"] for result in results))
    figure = Figure(figsize=(4.2 * len(modalities), 3.4), layout="constrained")
    panels = figure.subplots(1, len(modalities), squeeze=False)[0]
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe & Ito's
    for axes, modality in zip(panels, modalities, strict=True):
        mine = [r for r in results if r["modality"] == modality]
        for colour, hops in zip(colours, sorted({r["hops"] for r in mine}), strict=False):
            curves = [list(r["losses"].values()) for r in mine if r["hops"] == hops]
            for curve in curves:
                axes.plot(NOISES, curve, color=colour, linewidth=0.7, alpha=0.5)
            axes.plot(NOISES, np.mean(curves, 0), color=colour, marker="o", markersize=4, label=f"{hops} hops")
        axes.set(title=modality, xlabel="standard deviation of noise on the input", ylabel="held-out loss")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
