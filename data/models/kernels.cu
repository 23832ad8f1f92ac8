// The functions of fused.py on a GPU; read it first, it says what they compute and why. kernels.py compiles this file.
//
// The compiler is given NUMBER, the type of what lies in memory (fp16, bf16 or fp32), and N, how many of them a thread
// moves at once: 16 bytes, the most that one instruction can, or 1 where a row is no multiple of that. All arithmetic is
// fp32. Sums are made in a fixed order, so that two runs give the same bits.
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
struct Pack { float n[N]; };                                 // and as they are computed with

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

// ---- Group norm of x + shift, then SiLU where it is asked for ----
//
// An image is `pixels` rows of `channels` numbers. A block takes LANES · N channels of a stretch of pixels, one pack per
// lane, ROWS pixels at a time: a row of lanes reads 128 bytes in one go, and what belongs to a channel is computed once for
// the whole stretch. Three kernels: sums per channel and stretch; from them two means per group; then the result.

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

__device__ Pack shift_of(In shift, int stride, Place at) {  // stride 0: one shift for all images
    if (shift) return load(shift + at.image * stride + at.channel);
    return {};
}

// What a group's mean and 1/σ, and the channels' weights, make of x: x̂ = x · slope + offset, z = x̂ · weight + bias
struct Line { Pack slope, offset, weight, bias; };

__device__ Line line_of(In shift, int stride, const float* mean, const float* rstd, In weight, In bias, int groups,
                        int per_group, Place at) {
    Line line = {{}, shift_of(shift, stride, at), load(weight + at.channel), load(bias + at.channel)};
    for (int k = 0; k < N; k++) {
        size_t group = at.image * groups + (at.channel + k) / per_group;
        line.slope.n[k] = rstd[group];
        line.offset.n[k] = (line.offset.n[k] - mean[group]) * rstd[group];
    }
    return line;
}

// The gradient that reaches x̂, from z's or from that of its SiLU
__device__ float through(float dy, float normal, float weight, float bias, int silu) {
    if (silu) {
        float z = normal * weight + bias, s = sigmoid(z);
        dy *= s * (1 + z * (1 - s));
    }
    return dy * weight;
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
        float total = 0;
        for (int row = 0; row < ROWS; row++) total += rows[which][row][column];
        if (channel < channels)
            sums[((at.image * gridDim.x + blockIdx.x) * 2 + which) * channels + channel] = total;
    }
}

extern "C" __global__ void group_norm_sums(In x, In shift, int stride, float* sums, int pixels, int stretch, int channels) {
    Place at = place(pixels, stretch);
    Pack first = {}, second = {};
    if (at.channel < channels) {
        Pack s = shift_of(shift, stride, at);
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

extern "C" __global__ void group_norm_backward_sums(In dy, In x, In shift, int stride, const float* mean, const float* rstd,
                                                    In weight, In bias, float* sums, int pixels, int stretch, int channels,
                                                    int groups, int silu) {
    Place at = place(pixels, stretch);
    Pack first = {}, second = {};
    if (at.channel < channels) {
        Line line = line_of(shift, stride, mean, rstd, weight, bias, groups, channels / groups, at);
#pragma unroll 2
        for (int pixel = at.first; pixel < at.last; pixel += ROWS) {
            size_t i = (at.image * pixels + pixel) * channels + at.channel;
            Pack v = load(x + i), d = load(dy + i);
            for (int k = 0; k < N; k++) {
                float normal = v.n[k] * line.slope.n[k] + line.offset.n[k];
                float g = through(d.n[k], normal, line.weight.n[k], line.bias.n[k], silu);
                first.n[k] += g;
                second.n[k] += g * normal;
            }
        }
    }
    add_rows(first, second, sums, channels, at);
}

// One block per group (x) and image (y): the means of its two sums, or with `forward` mean and 1/σ
#define REDUCERS 128

extern "C" __global__ void group_norm_means(const float* sums, float* first, float* second, int pixels, int stretch,
                                            int channels, int stretches, float eps, int forward) {
    __shared__ float totals[2][REDUCERS];
    int per_group = channels / gridDim.x;
    float a = 0, b = 0;
    for (int i = threadIdx.x; i < stretches * per_group; i += REDUCERS) {
        size_t row = ((size_t)blockIdx.y * stretches + i / per_group) * 2;
        int channel = blockIdx.x * per_group + i % per_group;
        a += sums[row * channels + channel];
        b += sums[(row + 1) * channels + channel];
    }
    totals[0][threadIdx.x] = a;
    totals[1][threadIdx.x] = b;
    for (int half = REDUCERS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half)
            for (int which = 0; which < 2; which++) totals[which][threadIdx.x] += totals[which][threadIdx.x + half];
    }
    if (threadIdx.x) return;
    float count = (float)per_group * pixels, mean = totals[0][0] / count, square = totals[1][0] / count;
    int group = blockIdx.y * gridDim.x + blockIdx.x;
    first[group] = mean;
    second[group] = forward ? rsqrtf(fmaxf(square - mean * mean, 0) + eps) : square;
}

extern "C" __global__ void group_norm(In x, In shift, int stride, const float* mean, const float* rstd, In weight, In bias,
                                      Out y, int pixels, int stretch, int channels, int groups, int silu) {
    Place at = place(pixels, stretch);
    if (at.channel >= channels) return;
    Line line = line_of(shift, stride, mean, rstd, weight, bias, groups, channels / groups, at);
#pragma unroll 4
    for (int pixel = at.first; pixel < at.last; pixel += ROWS) {
        size_t i = (at.image * pixels + pixel) * channels + at.channel;
        Pack v = load(x + i);
        for (int k = 0; k < N; k++) {
            float z = (v.n[k] * line.slope.n[k] + line.offset.n[k]) * line.weight.n[k] + line.bias.n[k];
            v.n[k] = silu ? z * sigmoid(z) : z;
        }
        store(y + i, v);
    }
}

// first and second: what group_norm_means made of group_norm_backward_sums
extern "C" __global__ void group_norm_backward(In dy, In x, In shift, int stride, const float* mean, const float* rstd,
                                               In weight, In bias, const float* first, const float* second, Out dx,
                                               int pixels, int stretch, int channels, int groups, int silu) {
    Place at = place(pixels, stretch);
    if (at.channel >= channels) return;
    Line line = line_of(shift, stride, mean, rstd, weight, bias, groups, channels / groups, at);
    Pack constant, along;  // what leaves the gradient, because the group's mean and σ follow x
    for (int k = 0; k < N; k++) {
        size_t group = at.image * groups + (at.channel + k) / (channels / groups);
        constant.n[k] = first[group];
        along.n[k] = second[group];
    }
#pragma unroll 2
    for (int pixel = at.first; pixel < at.last; pixel += ROWS) {
        size_t i = (at.image * pixels + pixel) * channels + at.channel;
        Pack v = load(x + i), d = load(dy + i);
        for (int k = 0; k < N; k++) {
            float normal = v.n[k] * line.slope.n[k] + line.offset.n[k];
            float g = through(d.n[k], normal, line.weight.n[k], line.bias.n[k], silu);
            v.n[k] = line.slope.n[k] * (g - constant.n[k] - normal * along.n[k]);
        }
        store(dx + i, v);
    }
}
