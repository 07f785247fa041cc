"""Every test runs on two fake CPU devices, and compiles fast."""

import jax

jax.config.update('jax_num_cpu_devices', 4)
