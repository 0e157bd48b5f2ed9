// What the lanes of a warp compute together. Fragment layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16", of
// "mma.m16n8k32" and "movmatrix"; lane l is 4 * g + t.
#include <cstring>

#include "ptx_sm90_emulated.cuh"

namespace cuda_emulator {

void combine_shuffle(Lanes& lanes) {
  uint64_t values[kWarpSize];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (lanes[lane]) values[lane] = static_cast<Shuffle*>(lanes[lane])->value;
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!lanes[lane]) continue;
    Shuffle& shuffle = *static_cast<Shuffle*>(lanes[lane]);
    if (shuffle.source < 0 || shuffle.source >= kWarpSize || !lanes[shuffle.source]) {
      fault("lane " + std::to_string(lane) + " of a shuffle reads lane " + std::to_string(shuffle.source) +
            ", which does not take part in it");
      return;
    }
    shuffle.value = values[shuffle.source];
  }
}

void combine_ballot(Lanes& lanes) {
  uint64_t votes = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (lanes[lane]) votes |= static_cast<Shuffle*>(lanes[lane])->value << lane;
  }
  for (void* lane : lanes) {
    if (lane) static_cast<Shuffle*>(lane)->value = votes;
  }
}

void combine_any(Lanes& lanes) {
  combine_ballot(lanes);
  for (void* lane : lanes) {
    if (lane) static_cast<Shuffle*>(lane)->value = static_cast<Shuffle*>(lane)->value != 0;
  }
}

void combine_max(Lanes& lanes) {
  uint64_t largest = 0;
  for (void* lane : lanes) {
    if (lane) largest = std::max(largest, static_cast<Shuffle*>(lane)->value);
  }
  for (void* lane : lanes) {
    if (lane) static_cast<Shuffle*>(lane)->value = largest;
  }
}

float half_to_float(uint32_t bits) {
  __half_raw raw;
  raw.x = static_cast<unsigned short>(bits);
  return __half2float(raw);
}
float bf16_to_float(uint32_t bits) {
  const uint32_t wide = bits << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

namespace {

// Products of 16-bit floats are exact, and the sum of 16 of them and c is rounded once. (PTX leaves the rounding open:
// "at least single precision".)
template <float (*kToFloat)(uint32_t)>
void combine_mma(Lanes& lanes) {
  float a[16][16], b[16][8];
  for (int l = 0; l < kWarpSize; ++l) {
    const MmaLane& lane = *static_cast<const MmaLane*>(lanes[l]);
    const int g = l / 4, t = l % 4;
    for (int h = 0; h < 2; ++h) {  // the low and the high half of a register
      for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][2 * t + h + 8 * (i / 2)] = kToFloat(lane.a[i] >> 16 * h & 0xffff);
      for (int i = 0; i < 2; ++i) b[2 * t + h + 8 * i][g] = kToFloat(lane.b[i] >> 16 * h & 0xffff);
    }
  }
  for (int l = 0; l < kWarpSize; ++l) {
    const MmaLane& lane = *static_cast<const MmaLane*>(lanes[l]);
    for (int i = 0; i < 4; ++i) {
      const int row = l / 4 + 8 * (i / 2), column = 2 * (l % 4) + i % 2;
      double sum = lane.c[i];
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
      lane.c[i] = static_cast<float>(sum);
    }
  }
}

}  // namespace

void combine_mma_fp16(Lanes& lanes) {
  combine_mma<half_to_float>(lanes);
}
void combine_mma_bf16(Lanes& lanes) {
  combine_mma<bf16_to_float>(lanes);
}

// Unsigned bytes of A, signed ones of B.
void combine_mma_u8s8(Lanes& lanes) {
  int a[16][32], b[32][8];
  for (int l = 0; l < kWarpSize; ++l) {
    const IntegerMmaLane& lane = *static_cast<const IntegerMmaLane*>(lanes[l]);
    const int g = l / 4, t = l % 4;
    for (int byte = 0; byte < 4; ++byte) {
      for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][4 * t + byte + 16 * (i / 2)] = lane.a[i] >> 8 * byte & 0xff;
      for (int i = 0; i < 2; ++i) b[4 * t + byte + 16 * i][g] = static_cast<int8_t>(lane.b[i] >> 8 * byte & 0xff);
    }
  }
  for (int l = 0; l < kWarpSize; ++l) {
    const IntegerMmaLane& lane = *static_cast<const IntegerMmaLane*>(lanes[l]);
    for (int i = 0; i < 4; ++i) {
      const int row = l / 4 + 8 * (i / 2), column = 2 * (l % 4) + i % 2;
      for (int k = 0; k < 32; ++k) lane.c[i] += a[row][k] * b[k][column];
    }
  }
}

void combine_transpose(Lanes& lanes) {
  uint32_t rows[8][8];
  for (int l = 0; l < kWarpSize; ++l) {
    const uint32_t pair = *static_cast<uint32_t*>(lanes[l]);
    rows[l / 4][2 * (l % 4)] = pair & 0xffff;
    rows[l / 4][2 * (l % 4) + 1] = pair >> 16;
  }
  for (int l = 0; l < kWarpSize; ++l) {
    const int row = l / 4, column = 2 * (l % 4);
    *static_cast<uint32_t*>(lanes[l]) = rows[column][row] | rows[column + 1][row] << 16;
  }
}

// PTX ISA, "stmatrix" with .trans: a lane's register holds elements 2t and 2t + 1 of column g.
void combine_transposed_store(Lanes& lanes) {
  for (int l = 0; l < kWarpSize; ++l) {
    const MatrixStore& lane = *static_cast<const MatrixStore*>(lanes[l]);
    for (int matrix = 0; matrix < 4; ++matrix) {
      for (int h = 0; h < 2; ++h) {
        MatrixStore& target = *static_cast<MatrixStore*>(lanes[8 * matrix + 2 * (l % 4) + h]);
        target.row[l / 4] = static_cast<uint16_t>(lane.matrices[matrix] >> 16 * h);
      }
    }
  }
}

}  // namespace cuda_emulator
