"""Federated training in which only losses travel: a server and two clients.

    python docs/how_to/federated.py

The server is a process without a model. Each client is a process with data of its own,
which never leaves it. All start from the same weights and the same key.
"""

import hashlib
import subprocess
import sys
from multiprocessing.connection import Client, Listener

import numpy as np

CLIENTS, STEPS, PAIRS = 2, 200, 4


def serve():
    """Averages the losses of the clients, step by step."""
    with Listener(("localhost", 0), authkey=b"losses") as listener:
        port = str(listener.address[1])
        processes = [
            subprocess.Popen([sys.executable, __file__, str(number), port])
            for number in range(CLIENTS)
        ]
        arrived = [listener.accept() for _ in processes]
        connections = [c for _, c in sorted((c.recv(), c) for c in arrived)]
        sizes = set()
        for _ in range(STEPS):
            messages = [c.recv_bytes() for c in connections]
            tables = [np.frombuffer(message, np.float32) for message in messages]
            # In the order of the clients, so that the sum is rounded in one way.
            mean = np.sum(tables, axis=0, dtype=np.float32) / np.float32(CLIENTS)
            for connection in connections:
                connection.send_bytes(mean.tobytes())
            sizes |= {len(message) for message in messages}
        ends = [connection.recv() for connection in connections]
    for process in processes:
        process.wait()
    before, after = (np.mean([end[i] for end in ends]) for i in (0, 1))
    print(f"bytes from a client in a step: {sizes}")
    print(f"loss of all clients: {before:.3f} before, {after:.3f} after")
    print(f"clients with the same weights: {len({end[2] for end in ends}) == 1}")


def take_part(number, port):
    """One client: evaluates on its own data, and updates by the losses of all."""
    import jax
    import jax.numpy as jnp
    import optax

    import fgrad

    key = jax.random.key(0)
    x = jax.random.normal(jax.random.key(10 + number), (64, 16))
    y = jnp.tanh(x @ jnp.ones((16, 1)) / 4)

    def loss_fn(params, x, y):
        return jnp.mean((jnp.tanh(x @ jnp.asarray(params["w"])) - y) ** 2)

    options = {"epsilon": 1e-2, "num_perturbations": PAIRS}
    tx = optax.chain(
        fgrad.fixed_point_forward_grad(key, **options),
        optax.sgd(1e-2),
        fgrad.quantized_update(),
    )
    params = fgrad.quantize({"w": jnp.zeros((16, 1)) + 0.01}, bits=16, headroom=100)
    state = tx.init(params)

    @jax.jit
    def evaluate(params, step):
        return fgrad.pair_losses(
            loss_fn, params, key, step, kwargs={"x": x, "y": y}, **options
        )

    @jax.jit
    def update(params, state, losses):
        updates, state = tx.update(params, state, params, losses=losses)
        return optax.apply_updates(params, updates), state

    before = float(loss_fn(params, x, y))
    with Client(("localhost", port), authkey=b"losses") as server:
        server.send(number)
        for step in range(STEPS):
            losses = evaluate(params, step)
            server.send_bytes(np.asarray(losses, np.float32).tobytes())
            mean = np.frombuffer(server.recv_bytes(), np.float32)
            params, state = update(params, state, mean.reshape(2, PAIRS))
        weights = np.asarray(params["w"].qvalue).tobytes()
        after = float(loss_fn(params, x, y))
        server.send((before, after, hashlib.sha256(weights).hexdigest()))


if __name__ == "__main__":
    if len(sys.argv) == 1:
        serve()
    else:
        take_part(int(sys.argv[1]), int(sys.argv[2]))
