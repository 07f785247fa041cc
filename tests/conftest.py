"""Every test runs on four fake CPU devices."""

import jax

jax.config.update('jax_num_cpu_devices', 4)
