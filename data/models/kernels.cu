// The functions of fused.py on a GPU; read it first, it says what they compute and why. kernels.py compiles this file.
//
// The compiler is given NUMBER, the type of what lies in memory (fp16, bf16 or fp32), and N, how many of them a thread
// moves at once: 16 bytes, the most that one instruction can, or fewer where a row is no multiple of that. All arithmetic
// is fp32. Sums are made in a fixed order, so that two runs give the same bits.
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
__device__ void narrow(float f, bf16& to) {  // the upper half of an fp32, rounded to even; Turing has no instruction for it
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

// ---- GEGLU: a row of p is `width` packs of values, then as many of gates. A thread makes one pack of y, or two of dp. ----

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

// ---- x + y + bias: a pixel is `width` packs of channels ----

extern "C" __global__ void add(In x, In y, In bias, Out out, unsigned packs, unsigned width) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= packs) return;
    Pack a = load(x + (size_t)i * N), b = load(y + (size_t)i * N), c = load(bias + i % width * N);
    for (int k = 0; k < N; k++) a.n[k] += b.n[k] + c.n[k];
    store(out + (size_t)i * N, a);
}

// ---- Layer norm of a sum: sum = x + y, out = weight · (sum - mean) / σ + bias. A block per row, a thread per pack of it. ----
//
// Without y the sum is x itself, and is not written. Backward, dsum is the gradient that reaches the sum past the norm.

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
// An image is `pixels` rows of `channels` numbers. A block takes LANES · N channels of a stretch of pixels, one pack per
// lane, ROWS pixels at a time: a row of lanes reads 128 bytes in one go, and what belongs to a channel is fetched once for
// the whole stretch. Three kernels each way: sums per channel and stretch; from these what the group makes of each of its
// channels, (images, channels) fp32; then the result.

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

// The means of both sums over a group (blockIdx.x) of an image (blockIdx.y), a block for each
__device__ Pair group_means(const float* sums, int pixels, int channels, int stretches) {
    int per_group = channels / gridDim.x;
    Pair mine = {};
    for (int i = threadIdx.x; i < stretches * per_group; i += blockDim.x) {
        const float* row = sums + ((size_t)blockIdx.y * stretches + i / per_group) * 2 * channels;
        int channel = blockIdx.x * per_group + i % per_group;
        mine.first += row[channel];
        mine.second += row[channels + channel];
    }
    Pair all = total(mine);
    float count = (float)per_group * pixels;
    return {all.first / count, all.second / count};
}

// The gradient that reaches x̂, from y's
__device__ float through(float dy, float normal, float weight, float bias, int silu) {
    if (silu) {
        float z = normal * weight + bias, s = sigmoid(z);
        dy *= s * (1 + z * (1 - s));
    }
    return dy * weight;
}

// Σ (x + shift) and Σ (x + shift)². shift: null, or one row per image, `stride` apart; stride 0 is one row for all.
extern "C" __global__ void group_norm_sums(In x, In shift, int stride, float* sums, int pixels, int channels, int stretch) {
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

// x̂ = x · slope + offset
extern "C" __global__ void group_norm_line(const float* sums, In shift, int stride, float* slope, float* offset, int pixels,
                                           int channels, int stretches, float eps) {
    Pair mean = group_means(sums, pixels, channels, stretches);
    float rstd = rsqrtf(fmaxf(mean.second - mean.first * mean.first, 0) + eps);
    int per_group = channels / gridDim.x;
    for (int k = threadIdx.x; k < per_group; k += blockDim.x) {
        int channel = blockIdx.x * per_group + k;
        size_t image = blockIdx.y, i = image * channels + channel;
        slope[i] = rstd;
        offset[i] = ((shift ? widen(shift[image * stride + channel]) : 0) - mean.first) * rstd;
    }
}

extern "C" __global__ void group_norm(In x, const float* slope, const float* offset, In weight, In bias, Out y, int pixels,
                                      int channels, int stretch, int silu) {
    Place at = place(pixels, stretch);
    if (at.channel >= channels) return;
    size_t line = at.image * channels + at.channel;
    Pack a = *(const Pack*)(slope + line), b = *(const Pack*)(offset + line);
    Pack weights = load(weight + at.channel), biases = load(bias + at.channel);
    for (int k = 0; k < N; k++) {
        a.n[k] *= weights.n[k];
        b.n[k] = b.n[k] * weights.n[k] + biases.n[k];
    }
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

// Σ g and Σ g x̂, g being the gradient that reaches x̂
extern "C" __global__ void group_norm_backward_sums(In dy, In x, const float* slope, const float* offset, In weight, In bias,
                                                    float* sums, int pixels, int channels, int stretch, int silu) {
    Place at = place(pixels, stretch);
    Pack first = {}, second = {};
    if (at.channel < channels) {
        size_t line = at.image * channels + at.channel;
        Pack a = *(const Pack*)(slope + line), b = *(const Pack*)(offset + line);
        Pack weights = load(weight + at.channel), biases = load(bias + at.channel);
#pragma unroll 2
        for (int pixel = at.first; pixel < at.last; pixel += ROWS) {
            size_t i = (at.image * pixels + pixel) * channels + at.channel;
            Pack v = load(x + i), d = load(dy + i);
            for (int k = 0; k < N; k++) {
                float normal = v.n[k] * a.n[k] + b.n[k];
                float g = through(d.n[k], normal, weights.n[k], biases.n[k], silu);
                first.n[k] += g;
                second.n[k] += g * normal;
            }
        }
    }
    add_rows(first, second, sums, channels, at);
}

// What leaves the gradient because mean and σ follow x: constant + x̂ · along
extern "C" __global__ void group_norm_backward_line(const float* sums, float* constant, float* along, int pixels,
                                                    int channels, int stretches) {
    Pair mean = group_means(sums, pixels, channels, stretches);
    int per_group = channels / gridDim.x;
    for (int k = threadIdx.x; k < per_group; k += blockDim.x) {
        size_t i = (size_t)blockIdx.y * channels + blockIdx.x * per_group + k;
        constant[i] = mean.first;
        along[i] = mean.second;
    }
}

extern "C" __global__ void group_norm_backward(In dy, In x, const float* slope, const float* offset, In weight, In bias,
                                               const float* constant, const float* along, Out dx, int pixels, int channels,
                                               int stretch, int silu) {
    Place at = place(pixels, stretch);
    if (at.channel >= channels) return;
    size_t line = at.image * channels + at.channel;
    Pack a = *(const Pack*)(slope + line), b = *(const Pack*)(offset + line);
    Pack c = *(const Pack*)(constant + line), l = *(const Pack*)(along + line);
    Pack weights = load(weight + at.channel), biases = load(bias + at.channel);
#pragma unroll 2
    for (int pixel = at.first; pixel < at.last; pixel += ROWS) {
        size_t i = (at.image * pixels + pixel) * channels + at.channel;
        Pack v = load(x + i), d = load(dy + i);
        for (int k = 0; k < N; k++) {
            float normal = v.n[k] * a.n[k] + b.n[k];
            float g = through(d.n[k], normal, weights.n[k], biases.n[k], silu);
            v.n[k] = a.n[k] * (g - c.n[k] - normal * l.n[k]);
        }
        store(dx + i, v);
    }
}
