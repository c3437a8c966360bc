# Tables 1, 2, 7, 8 and 16 to 19: fine-tune, merge, score. As it stands: Table 1's column of Llama-3.1-8B.
# SETS, MODELS and METHODS choose others. REMAT=1 saves memory (LIMA and Dolly always do), NO_BOS=1 trains all methods
# without BOS, as the released code does.
. "$(dirname "$0")/functions.sh"
SETS=${SETS-gsm8k}  # of gsm8k arc dolly lima
MODELS=${MODELS-llama31}  # of llama31 instruct llama2 mistral qwen3
METHODS=${METHODS-sft neftune gem im sdft lfu-lora lfu-reps}  # and released-lora released-reps

for model in $MODELS; do
    score $model-vanilla ${MODEL_IDS[$model]}
    for set in $SETS; do
        for method in $METHODS; do cell $model $set $method; done
        rows=$(cd results && echo $model-$set-*/)  # of other METHODS too
        python "$here/table.py" $model-vanilla ${rows//\//} | tee results/$model-$set.txt
    done
done
