"""Names for methods with soft prompts, or that edit attention or read caches."""

from peftcore.authoring.instance_prompts import InstanceOperator
from peftcore.authoring.pass_cache import PassCache
from peftcore.authoring.prompts import PromptPositions, TokenStacks, VisibleTokens, cached_tokens
from peftcore.authoring.row_logits import head_sites, row_logits
from peftcore.forward.attention.attention import Attend, AttentionOperator
from peftcore.forward.context.tokens import Tokens
from peftcore.forward.sequence.sequence import Rows, SequenceOperator
from peftcore.forward.sequence.sequence_cache import self_attention_cache
from peftcore.forward.sequence.sequence_inside import InnerRows, InnerSite
from peftcore.roles.stacks import TokenStack, cache_in
from peftcore.targets.attention_sites import AttentionSite
from peftcore.targets.sequence_sites import SequenceSite

__all__ = [
    "Attend",
    "AttentionOperator",
    "AttentionSite",
    "InnerRows",
    "InnerSite",
    "InstanceOperator",
    "PassCache",
    "PromptPositions",
    "Rows",
    "SequenceOperator",
    "SequenceSite",
    "TokenStack",
    "TokenStacks",
    "Tokens",
    "VisibleTokens",
    "cache_in",
    "cached_tokens",
    "head_sites",
    "row_logits",
    "self_attention_cache",
]
