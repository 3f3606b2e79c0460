"""vLLM servers started, kept alive and ended, on this machine or on others. Standard library alone: a machine that serves need
not have what trains."""

from megatron_ext.vllm_servers.elsewhere import ServersElsewhere, serve
from megatron_ext.vllm_servers.options import KEY_VARIABLE, TOLERANCES, VllmOptions
from megatron_ext.vllm_servers.process import ServerProcesses

__all__ = ["KEY_VARIABLE", "TOLERANCES", "ServerProcesses", "ServersElsewhere", "VllmOptions", "serve"]
