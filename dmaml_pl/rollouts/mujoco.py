"""Environments of MuJoCo's physics: all that step together are one call of its native threads.

A step is a function of state and action alone, whichever thread takes it: MuJoCo's solver starts each from nothing
(`mujoco.rollout`), where gymnasium's starts from its last solution. The first step after a reset equals gymnasium's;
later ones differ by rounding, until chaos makes another trajectory of the same motion of it.

Legend: T tasks, B rollouts of a task, N = T x B, S size of a state, A controls, O observation.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dmaml_pl.checks import require_positive
from dmaml_pl.errors import ConfigError
from dmaml_pl.rollouts.environments import Environments, Step, Task

MODELS = Path(__file__).parent / "models"
"""Where the models are that the package has (MJCF)."""

Array = NDArray[np.float64]

_of_parents: list[Any] = []
"""Pools of the process that this one was forked from, whose threads are not here: ending those would wait for ever."""


class MujocoState(NamedTuple):
    """N environments: a value.

    Attributes:
        physics: time, positions and velocities of each, (N, S).
        parameters: of each one's task, by name, (N, ...).
        tasks: T.
    """

    physics: Array
    parameters: Mapping[str, Array]
    tasks: int


class MujocoEnvironments(Environments):
    """A family whose tasks differ in their reward. A subclass says what it is (`reward`), and draws tasks.

    Episodes begin as gymnasium's: the model's own pose with uniform noise, at rest but for normal noise. Actions are
    scaled, then clipped to what the motors can do. An episode whose physics broke down (MuJoCo begins such anew) has
    ended by this; the step counts nothing.

    Args:
        model: the file of the model, MJCF.
        frame_skip: steps of the physics in one step of the environment.
        action_scale: what an action is multiplied by. A policy whose standard deviation is one at full scale thrashes,
            and its gradients are noise.
        noise: of the first positions and velocities.

    Attributes:
        unseen: so many of the first positions say where it is, and are no observation.
        seconds: that one step takes.

    Raises:
        ConfigError: mujoco is not installed, or a value is not greater than zero.
    """

    unseen = 0
    broken: int

    def __init__(self, model: Path, *, frame_skip: int = 5, action_scale: float = 1.0, noise: float = 0.1) -> None:
        require_positive(**{"data.frame_skip": frame_skip, "data.action_scale": action_scale})
        self._mujoco = _import_mujoco(type(self).__name__)
        with self._silence():
            self.model = self._mujoco.MjModel.from_xml_path(str(model))
        self.frame_skip = frame_skip
        self.action_scale = action_scale
        self.noise = noise
        self.seconds = float(frame_skip * self.model.opt.timestep)
        self.actions = int(self.model.nu)
        self.observations = int(self.model.nq + self.model.nv - self.unseen)
        self.broken = 0
        self._kind = self._mujoco.mjtState.mjSTATE_FULLPHYSICS.value
        self._size = self._mujoco.mj_stateSize(self.model, self._kind)
        self._lowest, self._highest = self.model.actuator_ctrlrange.T.copy()
        self._pool: _Pool | None = None

    @abstractmethod
    def reward(self, before: Array, after: Array, control: Array, parameters: Mapping[str, Array]) -> Array:
        """Of one step of each environment, (N,).

        Args:
            before: states, (N, S); see `positions`.
            after: states, (N, S).
            control: of the motors, (N, A).
            parameters: of the tasks, (N, ...).
        """

    def observe(self, physics: Array) -> Array:
        """What is seen of states (N, S), (N, O): positions but for the unseen ones, and velocities."""
        return physics[:, 1 + self.unseen : 1 + self.model.nq + self.model.nv]

    def ended(self, physics: Array) -> NDArray[np.bool_]:
        """Which episodes have ended by their states, (N,); none, where no subclass says so."""
        return np.zeros(len(physics), dtype=bool)

    def positions(self, physics: Array) -> Array:
        """The generalized coordinates in states, (N, nq)."""
        return physics[:, 1 : 1 + self.model.nq]

    def reset(self, tasks: Sequence[Task], rollouts: int, generators: Sequence[torch.Generator]) -> tuple[Any, Tensor]:
        """Each task's first states from its generator."""
        nq, nv = self.model.nq, self.model.nv
        physics = np.zeros((len(tasks), rollouts, self._size))
        for each, generator in zip(physics, generators, strict=True):
            uniform = torch.rand(rollouts, nq, generator=generator, dtype=torch.float64).numpy()
            each[:, 1 : 1 + nq] = self.model.qpos0 + self.noise * (2 * uniform - 1)
            normal = torch.randn(rollouts, nv, generator=generator, dtype=torch.float64).numpy()
            each[:, 1 + nq : 1 + nq + nv] = self.noise * normal
        parameters = {
            name: np.array([task[name] for task in tasks], dtype=np.float64).repeat(rollouts, axis=0)
            for name in tasks[0]
        }
        state = MujocoState(physics.reshape(-1, self._size), parameters, len(tasks))
        return state, self._seen(state)

    def step(self, state: MujocoState, action: Tensor) -> Step:
        """All environments, on as many threads as PyTorch has in this process."""
        raw = action.detach().cpu().numpy().reshape(-1, self.actions).astype(np.float64)
        control = np.clip(self.action_scale * raw, self._lowest, self._highest)
        with self._silence():
            physics = self._threads().advance(state.physics, control)
        broken = np.abs(physics[:, 0] - state.physics[:, 0] - self.seconds) > self.seconds / 2  # the time began anew
        reward, ended = self.reward(state.physics, physics, control, state.parameters), self.ended(physics)
        if broken.any():
            self.broken += int(broken.sum())
            reward, ended = np.where(broken, 0.0, reward), ended | broken
        following = state._replace(physics=physics)
        shape = (state.tasks, -1)
        return Step(
            following,
            self._seen(following),
            torch.from_numpy(reward.astype(np.float32)).view(shape),
            torch.from_numpy(ended).view(shape),
        )

    def close(self) -> None:
        """Give the threads back; a further step takes new ones."""
        self._pool = None

    def velocity(self, before: Array, after: Array) -> Array:
        """Along the first position, which is forward in the models here, in m/s, mean over the step, (N,)."""
        return (self.positions(after)[:, 0] - self.positions(before)[:, 0]) / self.seconds

    def draw(self, states: Sequence[MujocoState]) -> NDArray[np.uint8] | None:
        """Pictures of the first environment in each of some states; None where EGL is not installed."""
        return self.frames(np.stack([state.physics[0] for state in states]))

    def frames(self, physics: Array, width: int = 320, height: int = 240) -> NDArray[np.uint8] | None:
        """Pictures of states one after another, (n, height, width, 3), as the model's first camera sees them.

        About 50 ms of processor time each, by EGL without a screen; None where that is not installed.

        Args:
            physics: (n, S), such as of one environment over time.
            width: of a picture.
            height: of a picture.
        """
        mujoco = self._mujoco
        try:
            from mujoco.egl import GLContext  # noqa: PLC0415 - it fails where there is no EGL

            window = GLContext(width, height)
        except Exception:  # of as many kinds as there are ways to lack it
            return None
        window.make_current()
        drawing = mujoco.MjrContext(self.model, mujoco.mjtFontScale.mjFONTSCALE_150)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, drawing)
        data, scene, options = mujoco.MjData(self.model), mujoco.MjvScene(self.model, 1000), mujoco.MjvOption()
        camera, whole = mujoco.MjvCamera(), mujoco.MjrRect(0, 0, width, height)
        camera.type, camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, 0
        pictures = np.empty((len(physics), height, width, 3), np.uint8)
        for picture, state in zip(pictures, physics, strict=True):
            mujoco.mj_setState(self.model, data, state, self._kind)
            mujoco.mj_forward(self.model, data)
            mujoco.mjv_updateScene(self.model, data, options, None, camera, mujoco.mjtCatBit.mjCAT_ALL, scene)
            mujoco.mjr_render(whole, scene, drawing)
            mujoco.mjr_readPixels(picture, None, whole, drawing)
        drawing.free()
        window.free()
        return pictures[:, ::-1]  # OpenGL's first row is the lowest

    def _seen(self, state: MujocoState) -> Tensor:
        seen = self.observe(state.physics).astype(np.float32)
        return torch.from_numpy(seen).view(state.tasks, -1, self.observations)

    def _threads(self) -> _Pool:
        """As many as PyTorch has now, of the process that steps: it knows its share of the cores after its start."""
        wanted = (os.getpid(), torch.get_num_threads())
        if self._pool is None or (self._pool.process, self._pool.threads) != wanted:
            self._pool = _Pool(self._mujoco, self.model, self.frame_skip, self._size, wanted[1])
        return self._pool

    @contextmanager
    def _silence(self) -> Iterator[None]:
        """Without MuJoCo's warnings, which it prints, and writes to a file in the user's folder."""
        settings = self._mujoco.MjLogConfig
        before, silent = settings.get(), settings.get()
        silent.logto_console = silent.logto_file = False
        settings.set(silent)
        try:
            yield
        finally:
            settings.set(before)


class _Pool:
    """Native threads that step, what each works on, and the memory that results are written to."""

    def __init__(self, mujoco: Any, model: Any, frame_skip: int, size: int, threads: int) -> None:
        from mujoco.rollout import Rollout  # noqa: PLC0415 - as mujoco itself

        self.process = os.getpid()
        self.threads = threads
        self._rollout = Rollout(nthread=threads if threads > 1 else 0)  # none besides this one
        self._data = [mujoco.MjData(model) for _ in range(threads)]
        self._model = model
        self._frame_skip = frame_skip
        self._size = size
        self._models: list[Any] = []
        self._states = self._sensors = np.empty(0)

    def advance(self, physics: Array, control: Array) -> Array:
        """The states (N, S) after as many steps of the physics as make one of the environment."""
        count = len(physics)
        if len(self._models) != count:
            self._models = [self._model] * count
            self._states = np.empty((count, self._frame_skip, self._size))
            self._sensors = np.empty((count, self._frame_skip, self._model.nsensordata))
        held = np.repeat(control[:, None], self._frame_skip, axis=1)
        self._rollout.rollout(
            self._models,
            self._data,
            physics,
            held,
            skip_checks=True,
            nstep=self._frame_skip,
            state=self._states,
            sensordata=self._sensors,
            chunk_size=max(1, count // (self.threads * 10)),
        )
        return self._states[:, -1].copy()

    def __del__(self) -> None:
        """Its threads end with it."""
        if self.process != os.getpid():
            _of_parents.append(self._rollout)


def _import_mujoco(what: str) -> Any:
    try:
        import mujoco  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigError(f"{what} needs mujoco: install it with  pip install 'dmaml_pl[mujoco]'.") from error
    if not hasattr(mujoco, "MjLogConfig"):
        raise ConfigError(
            f"{what} needs mujoco 4 or newer, and {mujoco.__version__} is installed: install it with  "
            "pip install 'dmaml_pl[mujoco]'."
        )
    return mujoco
