#!/usr/bin/env bash
# CGori.xcframework for iPhones and Apple-silicon simulators. Wants macOS with Xcode, CMake 3.24 and ExecuTorch 1.5's sources:
#
#   git clone -b v1.5.1 --recurse-submodules https://github.com/pytorch/executorch.git
#   EXECUTORCH=$PWD/executorch examples/ios/build.sh
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
: "${EXECUTORCH:?the folder of ExecuTorch\'s sources, named executorch}"
out="${OUT:-$here/build}"
frameworks=()

# one build: ExecuTorch's archives by its own preset, then the framework with the same toolchain and platform
build() {
  local preset="$1" platform="$2" archives="$out/executorch-$1"
  cmake -S "$EXECUTORCH" -B "$archives" --preset "$preset" --fresh -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_ARCHIVE_OUTPUT_DIRECTORY="$archives" -DEXECUTORCH_BUILD_COREML=OFF -DEXECUTORCH_BUILD_MPS=OFF \
    -DEXECUTORCH_BUILD_KERNELS_LLM=OFF -DEXECUTORCH_BUILD_KERNELS_TORCHAO=OFF
  cmake --build "$archives" --config Release
  local lib="$archives"
  # Xcode puts archives into a folder of the configuration
  [ -d "$archives/Release" ] && lib="$archives/Release"
  cmake -S "$here" -B "$out/gori-$preset" -G Xcode \
    -DCMAKE_TOOLCHAIN_FILE="$EXECUTORCH/third-party/ios-cmake/ios.toolchain.cmake" \
    -DPLATFORM="$platform" -DDEPLOYMENT_TARGET=17.0 -DEXECUTORCH_SOURCE="$EXECUTORCH" -DEXECUTORCH_ARCHIVES="$lib"
  cmake --build "$out/gori-$preset" --config Release
  frameworks+=(-framework "$(find "$out/gori-$preset" -name CGori.framework -type d | head -1)")
}

build ios OS64
build ios-simulator SIMULATORARM64
rm -rf "$here/CGori.xcframework"
xcodebuild -create-xcframework "${frameworks[@]}" -output "$here/CGori.xcframework"
