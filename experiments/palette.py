"""The colours of every figure: SFT blue, LfU (LoRA) orange, LfU (RepS) green, all else grey.

Told apart by the colour-blind too (Okabe and Ito), and by their brightness where there is no colour.
"""

SFT, LFU_LORA, LFU_REPS, BASELINE, INK, PAPER = "#0072b2", "#e07b00", "#009e73", "#8a8a8a", "#222222", "#ffffff"
