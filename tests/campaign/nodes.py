"""A drill with two nodes on one machine: one is cut off in mid-run, and the run goes on at another size.

    python tests/campaign/nodes.py --launcher deepspeed
    python tests/campaign/nodes.py --launcher torchrun --cut kill

Each node starts its own launcher, as on machines without ssh between them. Where Linux lets us (as root), a node is a
network namespace with a name and an address of its own, and `--cut link` takes its network away: nobody is told,
packets just stop. Elsewhere nodes are addresses of the loopback, and `--cut kill` ends all processes of one at once.

What must follow: the other node ends its rank with one sentence that names who is missing; the same command on one node
alone goes on from the last checkpoint; every sample comes once an epoch; losses are those of a run on two nodes that
nobody disturbed. Exit code 1 where anything is otherwise.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "src"))

import psutil  # noqa: E402
import yaml  # noqa: E402

BIN = Path(sys.executable).parent
SAMPLES, BATCH, EPOCHS = 96, 16, 6
STEPS = SAMPLES * EPOCHS // BATCH
CUT_AT = 9
PATIENCE = 10.0  # train.rank_timeout_seconds


class Nodes:
    """Two nodes. `namespaces`: with a network of their own."""

    def __init__(self, folder: Path, namespaces: bool):
        self.folder, self.began, self.started = folder, time.monotonic(), []
        self.names = [f"drill-{os.getpid()}-{node}" for node in (0, 1)] if namespaces else []
        self.addresses = ["10.77.0.1", "10.77.0.2"] if namespaces else ["127.0.0.1", "127.0.0.2"]
        try:
            for name in self.names:
                run("ip", "netns", "add", name)
            if namespaces:
                run("ip", "link", "add", "node0", "netns", self.names[0], "type", "veth", "peer", "name", "node1",
                    "netns", self.names[1])  # fmt: skip
            for node, name in enumerate(self.names):
                run("ip", "-n", name, "address", "add", f"{self.addresses[node]}/24", "dev", f"node{node}")
                for device in ("lo", f"node{node}"):
                    run("ip", "-n", name, "link", "set", device, "up")
        except BaseException:
            self.close()
            raise

    def start(self, node: int, command: list[str], output: str) -> subprocess.Popen:
        """Runs a command on a node, in a process group of its own."""
        device = f"node{node}" if self.names else "lo"
        env = os.environ | {
            "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}", "GLOO_SOCKET_IFNAME": device,
            "PYTHONPATH": f"{ROOT / 'tests' / 'helpers'}", "RECORD_TO": str(self.folder / output.partition(".")[0]),
            "PRELUDE_CACHE": str(self.folder / f"cache-of-node{node}"), "DS_ACCELERATOR": "cpu",
        }  # fmt: skip
        if self.names:
            named = ["unshare", "--uts", "sh", "-c", f'hostname node{node} && exec "$@"', "sh"]
            command = ["ip", "netns", "exec", self.names[node], *named, *command]
        with open(self.folder / output, "a") as told:
            process = subprocess.Popen(
                command, env=env, cwd=ROOT, stdout=told, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.started.append(process)
        return process

    def cut(self, how: str, process: subprocess.Popen) -> None:
        """Node 1, whose launcher `process` is."""
        if how == "link":
            run("ip", "-n", self.names[1], "link", "set", "node1", "down")
        else:  # ranks are no members of torchrun's group
            for one in [process, *psutil.Process(process.pid).children(recursive=True)]:
                with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                    os.kill(one.pid, signal.SIGKILL)

    def in_short(self, command: list[str]) -> str:
        words = " ".join(command)
        for folder, short in ((ROOT, ""), (BIN, ""), (self.folder, "FOLDER/")):
            words = words.replace(f"{folder}/", short)
        return words

    def say(self, words: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {words}", flush=True)

    def close(self) -> None:
        for process in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def may_have_namespaces() -> bool:
    name = f"drill-{os.getpid()}"
    try:
        run("ip", "netns", "add", name)
        run("ip", "netns", "delete", name)
        run("unshare", "--uts", "true")
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def written_recipe(folder: Path) -> Path:
    from prelude.data.shapes import write_shards

    write_shards(folder / "shapes", "train", num_samples=SAMPLES, seed=0, image_size=16)
    kwargs = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    recipe = {
        "run_dir": str(folder / "run"),
        "data": {"shards": str(folder / "shapes" / "train-*.tar"), "num_workers": 1, "timeout_seconds": PATIENCE / 2},
        "encoder": {"name": "vit_tiny_patch16_224", "image_size": 16, "patch_size": 4, "kwargs": kwargs},
        "objective": {
            "name": "recording:RecordingMAE", "decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2
        },
        "train": {
            "epochs": EPOCHS, "global_batch": BATCH, "precision": "fp32", "rank_timeout_seconds": PATIENCE
        },
        "optimizer": {"lr": 0.01, "warmup_epochs": 0.5},
        "checkpoint": {"every_steps": 4},
        "log": {"every_steps": 1, "pictures_every_steps": 1000},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def launchers(launcher: str, nodes: Nodes, recipe: Path, run_dir: str) -> list[list[str]]:
    """The command of each node."""
    port = free_port()
    door = [str(ROOT / "launch" / "pretrain.py"), "--config", str(recipe), f"run_dir={nodes.folder / run_dir}"]
    at = ["--master_addr", nodes.addresses[0], "--master_port", str(port)]
    if launcher == "torchrun":
        begin = [str(BIN / "torchrun"), "--nnodes", "2", "--nproc_per_node", "1", *at]
        return [[*begin, "--node_rank", str(node), "--local_addr", nodes.addresses[node], *door] for node in (0, 1)]
    hosts = nodes.folder / "hosts"
    hosts.write_text("".join(f"{address} slots=1\n" for address in nodes.addresses))
    begin = [str(BIN / "deepspeed"), "--hostfile", str(hosts), "--no_ssh", *at]
    return [[*begin, "--node_rank", str(node), *door] for node in (0, 1)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def metrics(folder: Path, run_dir: str) -> list[dict]:
    path = folder / run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def drill(nodes: Nodes, launcher: str, how: str, compare: bool) -> list[str]:
    """What was wrong."""
    folder, recipe = nodes.folder, written_recipe(nodes.folder)
    for name in ("undisturbed", "run"):
        (folder / name).mkdir()
    if compare:
        both = launchers(launcher, nodes, recipe, "undisturbed")
        codes = [nodes.start(node, both[node], f"undisturbed.node{node}") for node in (0, 1)]
        codes = [process.wait(240) for process in codes]
        nodes.say(f"a run on two nodes that nobody disturbs ends with {codes}")
        if codes != [0, 0]:
            return [f"the undisturbed run ended with {codes}"]
    both = launchers(launcher, nodes, recipe, "run")
    for node, command in enumerate(both):
        nodes.say(f"node {node}: {nodes.in_short(command)}")
    first, second = (nodes.start(node, both[node], f"run.node{node}") for node in (0, 1))
    until = time.monotonic() + 240
    saved = folder / "run" / "checkpoints" / "step-00000008"  # which a node that is lost before would cost
    while len(metrics(folder, "run")) < CUT_AT or not saved.exists():
        if first.poll() is not None or time.monotonic() > until:
            return ["the run never came to the step of the cut"]
        time.sleep(0.01)
    nodes.say(f"step {len(metrics(folder, 'run'))}: node 1 is cut off ({how})")
    nodes.cut(how, second)
    before = time.monotonic()
    code = first.wait(6 * PATIENCE + 60)
    nodes.say(f"node 0: the launcher ends with {code}, {time.monotonic() - before:.1f} s after the cut")
    wrong = told_of_it(nodes, "run.node0")
    if how == "link":
        code = second.wait(6 * PATIENCE + 60)
        nodes.say(f"node 1: the launcher ends with {code}, {time.monotonic() - before:.1f} s after the cut")
        wrong += told_of_it(nodes, "run.node1")
    alone = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "--config", str(recipe), f"run_dir={folder / 'run'}"]
    nodes.say(f"node 0: {nodes.in_short(alone)}")
    code = nodes.start(0, alone, "run.alone").wait(240)
    nodes.say(f"node 0 alone: {last_line(folder / 'run.alone', 'resumed at')}; ends with {code}")
    wrong += [f"the run on one node ended with {code}"] if code else []
    return wrong + compared(folder, compare)


def told_of_it(nodes: Nodes, output: str) -> list[str]:
    """A rank of a node that has lost the other says so in one sentence."""
    sentence = last_line(nodes.folder / output, "error: ")
    nodes.say(f"{output.partition('.')[2]} says: {sentence.replace(f'{nodes.folder}/', 'FOLDER/')}")
    return [] if sentence and "Traceback" not in sentence else [f"{output} has no sentence"]


def last_line(path: Path, word: str) -> str:
    return next((line for line in reversed(path.read_text(errors="replace").splitlines()) if word in line), "")


def compared(folder: Path, compare: bool) -> list[str]:
    wrong, drawn = [], {}
    for path in (folder / "run").glob("rank*.jsonl"):
        for record in map(json.loads, path.read_text().splitlines()):
            if drawn.setdefault(record["position"], record) != record:
                wrong.append(f"position {record['position']} was drawn twice, and differently")
    for epoch in range(EPOCHS):
        positions = range(epoch * SAMPLES, (epoch + 1) * SAMPLES)
        if sorted(drawn[p]["sample"] for p in positions if p in drawn) != list(range(SAMPLES)):
            wrong.append(f"epoch {epoch} has not every sample once")
    losses = [[line["loss"] for line in metrics(folder, name)] for name in ("run", "undisturbed")]
    if len(losses[0]) != STEPS:
        wrong.append(f"{len(losses[0])} steps in the log, and not {STEPS}")
    elif compare:
        worst = max(abs(a - b) / b for a, b in zip(*losses, strict=True))
        print(f"          losses differ from the undisturbed run's by {worst:.1e} at most, over {STEPS} steps")
        wrong += [f"losses differ by {worst}"] if worst > 1e-3 else []
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--launcher", choices=("torchrun", "deepspeed"), default="deepspeed")
    parser.add_argument("--cut", choices=("link", "kill"), help="default: link, where there are namespaces")
    parser.add_argument("--loopback", action="store_true", help="addresses of the loopback, and no namespaces")
    parser.add_argument("--without-comparison", action="store_true", help="no undisturbed run beside it")
    parser.add_argument("--folder", type=Path, help="kept afterwards (default: temporary)")
    args = parser.parse_args()
    namespaces = not args.loopback and may_have_namespaces()
    how = args.cut or ("link" if namespaces else "kill")
    if how == "link" and not namespaces:
        parser.error("--cut link needs network namespaces: Linux, root and `ip`")
    folder = args.folder or Path(tempfile.mkdtemp(prefix="nodes-"))
    folder.mkdir(parents=True, exist_ok=True)
    nodes = Nodes(folder, namespaces)
    try:
        kind = "network namespaces" if namespaces else "addresses of the loopback"
        nodes.say(f"two nodes ({kind}), {args.launcher}, {STEPS} steps")
        wrong = drill(nodes, args.launcher, how, not args.without_comparison)
    finally:
        nodes.close()
        if args.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    for words in wrong:
        print(f"wrong: {words}")
    print(f"{len(wrong)} wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
