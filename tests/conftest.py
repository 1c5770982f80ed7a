"""Eight virtual CPU devices, set up before JAX is imported, and the meshes that tests run on."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import pytest  # noqa: E402

from searchr1_jax import parallel  # noqa: E402


@pytest.fixture
def laptop():
    """The 1x1x1 mesh, in use."""
    with jax.set_mesh(parallel.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])) as mesh:
        yield mesh
