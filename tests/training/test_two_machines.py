"""Two hosts on a network of their own train one model: torchrun on each, as docs/training.md says.

The hosts are network namespaces joined by a pair of virtual Ethernet devices. They live in namespaces of the test's
process and vanish with it.
"""

import json
import shlex
import subprocess
import sys
from dataclasses import asdict

import pytest
import yaml
from distributed_run import HALF, SETTINGS
from launched import launched, losses
from small_models import one_thread  # noqa: F401
from small_runs import CONFIG, class_folders, train, weights

pytestmark = pytest.mark.slow

# As root, else as root of a user namespace.
WAYS_IN = (["unshare", "--net", "--mount"], ["unshare", "--user", "--map-root-user", "--net", "--mount"])
HOSTS = """
set -e
mount -t tmpfs none /run
for host in 1 2; do
    ip netns add host$host
    ip -n host$host link set lo up
done
ip link add veth1 netns host1 type veth peer name veth2 netns host2
for host in 1 2; do
    ip -n host$host address add 10.77.0.$host/24 dev veth$host
    ip -n host$host link set veth$host up
done
"""
RUN = """
on_host() {{
    nsenter --net=/run/netns/host$1 env GLOO_SOCKET_IFNAME=veth$1 {torchrun} --node-rank $(($1 - 1)) {command}
}}
on_host 1 & first=$!
on_host 2 & second=$!
wait $first
wait $second
ip -n host1 -json -statistics link show dev veth1 > {root}/traffic.json
"""


def way_in():
    """The command before a script in which it may make hosts. Skips the test with the reason if there is none."""
    reasons = []
    for way in WAYS_IN:
        try:
            tried = subprocess.run([*way, "sh", "-c", HOSTS], capture_output=True, text=True, timeout=60, check=False)
        except OSError as error:
            reasons.append(str(error))
            continue
        if tried.returncode == 0:
            return way
        reasons.append(f"{' '.join(way)}: {tried.stderr.strip()}")
    pytest.skip(f"no network namespaces here: {'; '.join(reasons)}")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    way, root = way_in(), tmp_path_factory.mktemp("machines")
    data = class_folders(root / "data", images=40)
    settings = {name: value for name, value in asdict(HALF).items() if value is not None}
    recipe = {"task": "finetune", "config": CONFIG, "settings": json.loads(json.dumps(settings))}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    torchrun += ["--master-addr=10.77.0.1", "--master-port=29500"]
    command = ["-m", "focalnet", "finetune", data, "--recipe", root / "recipe.yaml", "--output", root / "two"]
    words = {name: shlex.join(map(str, parts)) for name, parts in (("torchrun", torchrun), ("command", command))}
    script = HOSTS + RUN.format(root=shlex.quote(str(root)), torchrun=words["torchrun"], command=words["command"])
    train(data, root / "one", SETTINGS)
    (root / "output.txt").write_text(launched([*way, "sh", "-c", script]))
    return root


def test_losses_are_those_of_one_process(root):
    assert json.loads((root / "two" / "summary.json").read_text())["processes"] == 2
    assert len(losses(root / "one")) == 8
    assert losses(root / "two") == pytest.approx(losses(root / "one"), abs=1e-4)


def test_weights_are_those_of_one_process(root):
    one, two = weights(root / "one"), weights(root / "two")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert (two[name] - tensor).abs().max() <= 1e-3 * tensor.abs().max() + 1e-5, name


def test_gradients_went_over_the_wire(root):
    (device,) = json.loads((root / "traffic.json").read_text())
    parameters = json.loads((root / "two" / "summary.json").read_text())["parameters"]
    # In a ring of two, each host receives the other's half of the sums and the sums of its half: all bytes, each step.
    assert device["stats64"]["rx"]["bytes"] >= 8 * 4 * parameters


def test_one_host_tells(root):
    assert (root / "output.txt").read_text().count("done: 2 epochs") == 1
