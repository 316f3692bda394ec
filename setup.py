"""Packaging of megatron_hpt.

Dependencies are deliberately not listed here: the host stack is pinned completely in
``requirements/host.txt`` and installed with ``--no-deps`` (see the Makefile), because resolving
vLLM's CPU build pulls CUDA builds of torch's companions that break ``transformers``.
"""

from setuptools import find_packages, setup

setup(
    name="megatron_hpt",
    version="0.1.0",
    description="Hybrid post-training (SFT and RL as one estimator) on Megatron-Core with vLLM rollouts",
    packages=find_packages(include=["megatron_hpt", "megatron_hpt.*"]),
    package_data={"megatron_hpt.telemetry.report": ["*.html", "*.css", "*.js"]},
    python_requires=">=3.11",
    entry_points={
        "console_scripts": ["megatron-hpt = megatron_hpt.cli:main"],
        # vLLM calls this in every one of its processes; it registers our weight receiver.
        "vllm.general_plugins": ["megatron_hpt = megatron_hpt.engines.vllm.plugin:register"],
        # Likewise SGLang; the platform is its host without a GPU.
        "sglang.srt.plugins": ["megatron_hpt = megatron_hpt.engines.sglang.plugin:register"],
        "sglang.srt.platforms": ["megatron_hpt_host = megatron_hpt.engines.sglang.host:activate"],
    },
)
