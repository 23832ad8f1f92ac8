// The functions of fused.py on a GPU; read it first, it says what they compute and why. kernels.py compiles this file.
//
// The compiler is given NUMBER, the type of what lies in memory (fp16, bf16 or fp32), and N, the size of a pack: as
// many neighbours as a thread moves at once. These are 16 bytes, the most that one instruction can, or fewer where a
// row is no multiple of that. All arithmetic is fp32. Sums are made in a fixed order, so that two runs give the same
// bits.
//
// CUDA's headers are not included, because a machine without the CUDA toolkit has them in no certain place. They would
// give the two 16-bit types, which are written here.

struct fp16 { unsigned short bits; };
struct bf16 { unsigned short bits; };
typedef float fp32;

__device__ float widen(float f) { return f; }
__device__ float widen(fp16 h) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h.bits)); return f; }
__device__ float widen(bf16 b) { return __uint_as_float((unsigned)b.bits << 16); }

__device__ void narrow(float f, float& to) { to = f; }
__device__ void narrow(float f, fp16& to) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(f)); }
__device__ void narrow(float f, bf16& to) {  // the upper half of an fp32, rounded to even; a T4 cannot do it by itself
    unsigned u = __float_as_uint(f);
    to.bits = f == f ? (u + 0x7fff + (u >> 16 & 1)) >> 16 : 0x7fff;
}

typedef const NUMBER* __restrict__ In;  // nothing else writes there, so that loads need not wait for stores before them
typedef NUMBER* __restrict__ Out;

struct alignas(N * sizeof(NUMBER)) Packed { NUMBER n[N]; };  // N neighbours as they lie in memory
struct alignas(N < 4 ? N * 4 : 16) Pack { float n[N]; };     // and as they are computed with

__device__ Pack load(In at) {
    Packed packed = *(const Packed*)at;
    Pack x;
    for (int k = 0; k < N; k++) x.n[k] = widen(packed.n[k]);
    return x;
}

__device__ void store(Out at, Pack x) {
    Packed packed;
    for (int k = 0; k < N; k++) narrow(x.n[k], packed.n[k]);
    *(Packed*)at = packed;
}

__device__ float sigmoid(float x) { return __fdividef(1, 1 + __expf(-x)); }

struct Pair { float first, second; };

// Both sums over the threads of a block, known to all of them; once per kernel
__device__ Pair total(Pair mine) {
    __shared__ Pair warps[32];
    for (int apart = 16; apart > 0; apart /= 2) {
        mine.first += __shfl_xor_sync(~0u, mine.first, apart);
        mine.second += __shfl_xor_sync(~0u, mine.second, apart);
    }
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
    __syncthreads();
    Pair all = {};
    for (int warp = 0; warp < blockDim.x / 32; warp++) {
        all.first += warps[warp].first;
        all.second += warps[warp].second;
    }
    return all;
}

// ---- GEGLU: y = value · gelu(gate) ----
//
// A row of p is `width` packs of values, then as many of gates. A thread makes one pack of y, or two of dp. Offsets have
// 64 bits, because in 32 they might wrap around, and the compiler would write a pack as four numbers of 4 bytes.

__device__ float below(float x) { return 0.5f * (1 + erff(x * 0.70710678f)); }  // of a standard normal distribution
__device__ float density(float x) { return 0.39894228f * __expf(-0.5f * x * x); }

extern "C" __global__ void geglu(In p, Out y, unsigned packs, unsigned width) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= packs) return;
    size_t columns = (size_t)width * N, at = i / width * 2 * columns + i % width * N;
    Pack value = load(p + at), gate = load(p + at + columns);
    for (int k = 0; k < N; k++) value.n[k] *= gate.n[k] * below(gate.n[k]);
    store(y + (size_t)i * N, value);
}

extern "C" __global__ void geglu_backward(In dy, In p, Out dp, unsigned packs, unsigned width) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= packs) return;
    size_t columns = (size_t)width * N, at = i / width * 2 * columns + i % width * N;
    Pack d = load(dy + (size_t)i * N), value = load(p + at), gate = load(p + at + columns), dvalue, dgate;
    for (int k = 0; k < N; k++) {
        float g = gate.n[k], b = below(g);
        dvalue.n[k] = d.n[k] * g * b;
        dgate.n[k] = d.n[k] * value.n[k] * (b + g * density(g));
    }
    store(dp + at, dvalue);
    store(dp + at + columns, dgate);
}

// ---- x + y + bias ----
//
// A pixel is `width` packs of channels, and a thread makes one pack.

extern "C" __global__ void add(In x, In y, In bias, Out out, unsigned packs, unsigned width) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= packs) return;
    Pack a = load(x + (size_t)i * N), b = load(y + (size_t)i * N), c = load(bias + i % width * N);
    for (int k = 0; k < N; k++) a.n[k] += b.n[k] + c.n[k];
    store(out + (size_t)i * N, a);
}

// ---- Layer norm of a sum: sum = x + y, out = weight · (sum - mean) / σ + bias ----
//
// A block makes one row, a thread one pack of it. Without y the sum is x itself, and is not written. In the backward
// dsum is the gradient that reaches the sum past the norm.

extern "C" __global__ void add_layer_norm(In x, In y, In weight, In bias, Out sum, Out out, float* mean, float* rstd,
                                          int columns, float eps) {
    int c = threadIdx.x * N;
    size_t i = (size_t)blockIdx.x * columns + c;
    Pack v = {};
    Pair mine = {};
    if (c < columns) {
        v = load(x + i);
        if (y) {
            Pack w = load(y + i);
            for (int k = 0; k < N; k++) v.n[k] += w.n[k];
            store(sum + i, v);
        }
        for (int k = 0; k < N; k++) {
            mine.first += v.n[k];
            mine.second += v.n[k] * v.n[k];
        }
    }
    Pair all = total(mine);
    float m = all.first / columns, r = rsqrtf(fmaxf(all.second / columns - m * m, 0) + eps);
    if (c < columns) {
        Pack w = load(weight + c), b = load(bias + c);
        for (int k = 0; k < N; k++) v.n[k] = (v.n[k] - m) * r * w.n[k] + b.n[k];
        store(out + i, v);
    }
    if (threadIdx.x == 0) {
        mean[blockIdx.x] = m;
        rstd[blockIdx.x] = r;
    }
}

extern "C" __global__ void add_layer_norm_backward(In dsum, In dout, In sum, In weight, const float* mean,
                                                   const float* rstd, Out dx, int columns) {
    int c = threadIdx.x * N;
    size_t i = (size_t)blockIdx.x * columns + c;
    float m = mean[blockIdx.x], r = rstd[blockIdx.x];
    Pack normal = {}, g = {}, d = {};
    Pair mine = {};
    if (c < columns) {
        Pack w = load(weight + c);
        normal = load(sum + i), g = load(dout + i), d = load(dsum + i);
        for (int k = 0; k < N; k++) {
            normal.n[k] = (normal.n[k] - m) * r;
            g.n[k] *= w.n[k];
            mine.first += g.n[k];
            mine.second += g.n[k] * normal.n[k];
        }
    }
    Pair all = total(mine);
    if (c < columns) {
        for (int k = 0; k < N; k++)
            d.n[k] += r * (g.n[k] - all.first / columns - normal.n[k] * all.second / columns);
        store(dx + i, d);
    }
}

// ---- Group norm of x + shift, then SiLU where it is asked for ----
//
// An image is `pixels` rows of `channels` numbers. A block takes LANES · N channels of a stretch of pixels, ROWS
// pixels at a time, a lane one pack of them: 128 bytes lie side by side. Three kernels each way: sums per channel and
// stretch; from these, per group, two numbers for each channel that say all about it; the result.
//
//     z  = weight · x̂ + bias                  = x · scale + offset                 x̂ = (x + shift - mean) / σ
//     dx = (g - mean(g) - x̂ · mean(g x̂)) / σ  = dz · scale + x · slope + constant  g = dz · weight
//
// The means are a group's. scale, offset, slope, constant are (images, channels), mean and rstd = 1/σ (images, groups).

#define LANES 8
#define ROWS 32

struct Place {
    int channel, first, last;  // this thread's first channel, and its pixels: first, first + ROWS, … before last
    size_t image;
};

__device__ Place place(int pixels, int stretch) {
    int start = blockIdx.x * stretch;
    return {(int)(blockIdx.y * LANES + threadIdx.x % LANES) * N, start + (int)threadIdx.x / LANES,
            min(start + stretch, pixels), blockIdx.z};
}

__device__ Pack fetch(const float* per_channel, int channels, Place at) {
    return *(const Pack*)(per_channel + at.image * channels + at.channel);
}

// A block's two sums per channel over its rows -> sums (images, stretches, 2, channels)
__device__ void add_rows(Pack first, Pack second, float* sums, int channels, Place at) {
    __shared__ float rows[2][ROWS][LANES * N];
    for (int k = 0; k < N; k++) {
        rows[0][threadIdx.x / LANES][threadIdx.x % LANES * N + k] = first.n[k];
        rows[1][threadIdx.x / LANES][threadIdx.x % LANES * N + k] = second.n[k];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * LANES * N; i += LANES * ROWS) {
        int which = i / (LANES * N), column = i % (LANES * N), channel = blockIdx.y * LANES * N + column;
        float all = 0;
        for (int row = 0; row < ROWS; row++) all += rows[which][row][column];
        if (channel < channels) sums[((at.image * gridDim.x + blockIdx.x) * 2 + which) * channels + channel] = all;
    }
}

// Σ (x + shift) and Σ (x + shift)². shift: null, or one row per image, `stride` apart; stride 0 is one row for all.
extern "C" __global__ void group_norm_sums(In x, In shift, int stride, float* sums, int pixels, int channels,
                                           int stretch) {
    Place at = place(pixels, stretch);
    Pack first = {}, second = {}, s = {};
    if (at.channel < channels) {
        if (shift) s = load(shift + at.image * stride + at.channel);
#pragma unroll 4
        for (int pixel = at.first; pixel < at.last; pixel += ROWS) {
            Pack v = load(x + (at.image * pixels + pixel) * channels + at.channel);
            for (int k = 0; k < N; k++) {
                float n = v.n[k] + s.n[k];
                first.n[k] += n;
                second.n[k] += n * n;
            }
        }
    }
    add_rows(first, second, sums, channels, at);
}

// A block per group (blockIdx.x) and image (blockIdx.y)
extern "C" __global__ void group_norm_line(const float* sums, In shift, int stride, In weight, In bias, float* mean,
                                           float* rstd, float* scale, float* offset, int pixels, int channels,
                                           int stretches, float eps) {
    int per_group = channels / gridDim.x, start = blockIdx.x * per_group;
    size_t image = blockIdx.y;
    Pair mine = {};
    for (int i = threadIdx.x; i < stretches * per_group; i += blockDim.x) {
        const float* row = sums + (image * stretches + i / per_group) * 2 * channels + start + i % per_group;
        mine.first += row[0];
        mine.second += row[channels];
    }
    Pair all = total(mine);
    float m = all.first / per_group / pixels, r = rsqrtf(fmaxf(all.second / per_group / pixels - m * m, 0) + eps);
    for (int c = start + threadIdx.x; c < start + per_group; c += blockDim.x) {
        float w = widen(weight[c]) * r, s = shift ? widen(shift[image * stride + c]) : 0;
        scale[image * channels + c] = w;
        offset[image * channels + c] = (s - m) * w + widen(bias[c]);
    }
    if (threadIdx.x == 0) {
        mean[image * gridDim.x + blockIdx.x] = m;
        rstd[image * gridDim.x + blockIdx.x] = r;
    }
}

extern "C" __global__ void group_norm(In x, const float* scale, const float* offset, Out y, int pixels, int channels,
                                      int stretch, int silu) {
    Place at = place(pixels, stretch);
    if (at.channel >= channels) return;
    Pack a = fetch(scale, channels, at), b = fetch(offset, channels, at);
#pragma unroll 4
    for (int pixel = at.first; pixel < at.last; pixel += ROWS) {
        size_t i = (at.image * pixels + pixel) * channels + at.channel;
        Pack v = load(x + i);
        for (int k = 0; k < N; k++) {
            float z = v.n[k] * a.n[k] + b.n[k];
            v.n[k] = silu ? z * sigmoid(z) : z;
        }
        store(y + i, v);
    }
}

// The gradient of z from that of its SiLU
__device__ float through_silu(float dy, float z) {
    float s = sigmoid(z);
    return dy * s * (1 + z * (1 - s));
}

// Σ dz and Σ dz z
extern "C" __global__ void group_norm_backward_sums(In dy, In x, const float* scale, const float* offset, float* sums,
                                                    int pixels, int channels, int stretch, int silu) {
    Place at = place(pixels, stretch);
    Pack first = {}, second = {};
    if (at.channel < channels) {
        Pack a = fetch(scale, channels, at), b = fetch(offset, channels, at);
#pragma unroll 2
        for (int pixel = at.first; pixel < at.last; pixel += ROWS) {
            size_t i = (at.image * pixels + pixel) * channels + at.channel;
            Pack v = load(x + i), d = load(dy + i);
            for (int k = 0; k < N; k++) {
                float z = v.n[k] * a.n[k] + b.n[k], dz = silu ? through_silu(d.n[k], z) : d.n[k];
                first.n[k] += dz;
                second.n[k] += dz * z;
            }
        }
    }
    add_rows(first, second, sums, channels, at);
}

extern "C" __global__ void group_norm_backward_line(const float* sums, In shift, int stride, In weight, In bias,
                                                    const float* mean, const float* rstd, float* slope, float* constant,
                                                    int pixels, int channels, int stretches) {
    int per_group = channels / gridDim.x, start = blockIdx.x * per_group;
    size_t image = blockIdx.y;
    Pair mine = {};
    for (int i = threadIdx.x; i < stretches * per_group; i += blockDim.x) {
        int c = start + i % per_group;
        const float* row = sums + (image * stretches + i / per_group) * 2 * channels + c;
        mine.first += row[0] * widen(weight[c]);                 // g is dz · weight
        mine.second += row[channels] - row[0] * widen(bias[c]);  // and g x̂ is dz (z - bias)
    }
    Pair all = total(mine);
    float g = all.first / per_group / pixels, along = all.second / per_group / pixels;
    float m = mean[image * gridDim.x + blockIdx.x], r = rstd[image * gridDim.x + blockIdx.x];
    for (int c = start + threadIdx.x; c < start + per_group; c += blockDim.x) {
        float s = shift ? widen(shift[image * stride + c]) : 0;
        slope[image * channels + c] = -r * r * along;
        constant[image * channels + c] = -r * (g + (s - m) * r * along);
    }
}

extern "C" __global__ void group_norm_backward(In dy, In x, const float* scale, const float* offset, const float* slope,
                                               const float* constant, Out dx, int pixels, int channels, int stretch,
                                               int silu) {
    Place at = place(pixels, stretch);
    if (at.channel >= channels) return;
    Pack a = fetch(scale, channels, at), b = fetch(offset, channels, at);
    Pack s = fetch(slope, channels, at), c = fetch(constant, channels, at);
#pragma unroll 2
    for (int pixel = at.first; pixel < at.last; pixel += ROWS) {
        size_t i = (at.image * pixels + pixel) * channels + at.channel;
        Pack v = load(x + i), d = load(dy + i);
        for (int k = 0; k < N; k++) {
            float dz = silu ? through_silu(d.n[k], v.n[k] * a.n[k] + b.n[k]) : d.n[k];
            v.n[k] = dz * a.n[k] + v.n[k] * s.n[k] + c.n[k];
        }
        store(dx + i, v);
    }
}
