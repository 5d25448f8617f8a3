#!/usr/bin/env bash
# The iisan-paper matrix on a GPU under both protocols, and gpu_speed.toml, in pieces of at most ten minutes (docs/gpu.md):
#   scripts/gpu_matrix.sh DATA OUT [--set KEY=VALUE ...]
# DATA holds items.tsv and users.tsv. Without an images folder or images.zip there, every item gets a noise image.
# Repeat the command until it exits with 0; 75 means that work remains. An interrupted cell starts over.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2; }
data=$1 out=$2 device=${DEVICE:-cuda}
shift 2
here=$(cd "$(dirname "$0")" && pwd)
until=$((SECONDS + ${PIECE_S:-570}))
mkdir -p "$out"
export TPME_STORE=${TPME_STORE:-$out/store}

# Encoders: hub IDs or folders with configuration and tokenizer. WEIGHTS=pretrained also needs their weights.
settings=(
    --set "datasets.path=$out/data" --set "training.epochs=${EPOCHS:-3}"
    --set "encoders.text.source=${TEXT:-bert-base-uncased}" --set "encoders.text.weights=${WEIGHTS:-random}"
    --set "encoders.image.source=${IMAGE:-google/vit-base-patch16-224}" --set "encoders.image.weights=${WEIGHTS:-random}"
)

piece() { # run a command within the rest of this call's time
    local left=$((until - SECONDS)) code=0
    [ "$left" -gt 0 ] && timeout "$left" "$@" || code=$?
    if [ "$left" -le 0 ] || [ "$code" -eq 124 ]; then
        echo "The time limit of this call (PIECE_S) is reached: call again." >&2
        exit 75
    fi
    return "$code"
}

if [ ! -s "$out/doctor.json" ]; then
    noise=(--noise) # the noise floor of the device goes into every record
    [ "$device" = cuda ] || noise=()
    piece tpme doctor "${noise[@]}" --json > "$out/doctor.partial"
    mv "$out/doctor.partial" "$out/doctor.json"
fi
if [ ! -s "$out/data/dataset.json" ]; then
    images=$data/images
    [ -e "$images" ] || images=$data/images.zip
    if [ ! -e "$images" ]; then
        images=$out/noise.zip
        [ -e "$images" ] || piece python "$here/noise_images.py" "$data/items.tsv" "$images"
    fi
    piece tpme prepare iisan "$data" "$out/data" --images "$images" --image-size "${IMAGE_SIZE:-224}"
fi
failed=0
for pass in ${PASSES:-paper suite speed}; do
    matrix=iisan-paper own=()
    case $pass in
        # Only the paper's protocol has batch sizes per method.
        suite) own=(--set "protocol=suite" --set "methods.training={}") ;;
        speed)
            matrix=$here/gpu_speed.toml
            [ "$device" = cuda ] || own=(--set "training.cuda_graphs=false" --set "training.precision=fp32")
            ;;
    esac
    # Exit code 1: a cell failed; its record and the other cells are there.
    piece tpme run "$matrix" --device "$device" --out "$out/$pass" --no-report \
        "${settings[@]}" "${own[@]}" "$@" || { [ $? -eq 1 ] && failed=1; }
    piece tpme plan "$matrix" --runs "$out/$pass" --device-profile here \
        "${settings[@]}" "${own[@]}" "$@" > "$out/plan-$pass.txt" || true
    (cd "$out/$pass" && find cells -name 'attempt-*.json' -o -name 'attempt-*.npz') |
        while read -r file; do
            mkdir -p "$out/records/$pass/$(dirname "$file")"
            cp "$out/$pass/$file" "$out/records/$pass/$file"
        done
done
piece tpme report "$out/records" --out "$out/report" --title "iisan-paper on a GPU"
exit "$failed"
