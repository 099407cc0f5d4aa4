"""DeBERTa v2 and v3: as BERT."""

from dataclasses import replace

from moemerge.models.families import bert

FAMILY = replace(bert.FAMILY, model_type="deberta-v2")
