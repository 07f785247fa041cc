# Sourced: XLA_FLAGS by which programs that run once compile in under half of
# the time.
XLA_FLAGS='--xla_backend_optimization_level=0'
XLA_FLAGS+=' --xla_llvm_disable_expensive_passes=true'
XLA_FLAGS+=' --xla_cpu_parallel_codegen_split_count=1'
# The newest JAX does not know this one any more.
[ -n "${LATEST:-}" ] || XLA_FLAGS+=' --xla_cpu_use_fusion_emitters=false'
export XLA_FLAGS
