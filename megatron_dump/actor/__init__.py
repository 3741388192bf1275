"""The policy on megatron-core; the only package that imports it."""

from megatron_dump.actor.megatron_versions import refuse_older

refuse_older()
