"""Models as they are shared: a folder of its own with a model card, and the way to the Hugging Face hub."""

from acdit.hub.folder import Shared, share
from acdit.hub.pushing import push, require_pushable

__all__ = ["Shared", "push", "require_pushable", "share"]
