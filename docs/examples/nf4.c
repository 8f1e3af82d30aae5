/* NF4 in C, for the conformance kit's pipe: reads cases on stdin, writes results on stdout.
 *
 *   cc -O2 -ffp-contract=off -o nf4 nf4.c
 *   python -m bnbref vectors gen quantize_4bit | ./nf4 | python -m bnbref vectors check quantize_4bit
 *   python -m bnbref vectors gen dequantize_4bit | ./nf4 | python -m bnbref vectors check dequantize_4bit
 *
 * float32 only; FP4 and the other dtypes are answered "unsupported", which is no failure.
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const uint32_t VALUE_BITS[16] = {
    0xbf800000, 0xbf3239b1, 0xbf066b30, 0xbeca32a0, 0xbe91a24d, 0xbe3d353f, 0xbdba7871, 0x00000000,
    0x3da2faff, 0x3e24cae3, 0x3e7c04dd, 0x3ead033a, 0x3ee1a4b8, 0x3f1007ab, 0x3f3913b3, 0x3f800000};

static float from_bits(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
static uint32_t to_bits(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }

/* Rule Q4-3: the number of thresholds strictly below; the thresholds are the float32 midpoints. NaN is above none. */
static int code_of(float scaled) {
    int code = 0;
    for (int i = 0; i < 15; i++)
        code += scaled > (from_bits(VALUE_BITS[i]) + from_bits(VALUE_BITS[i + 1])) * 0.5f;
    return code;
}

/* Rules Q4-1, Q4-2, Q4-6, Q4-7. packed has (n + 1) / 2 bytes, absmax one float for each block. */
static void quantize(const float *x, long n, long blocksize, unsigned char *packed, float *absmax) {
    for (long b = 0; b * blocksize < n; b++) {
        long end = (b + 1) * blocksize < n ? (b + 1) * blocksize : n;
        float largest = 0.0f;
        for (long i = b * blocksize; i < end; i++)
            if (fabsf(x[i]) > largest) largest = fabsf(x[i]); /* a NaN is not larger */
        absmax[b] = largest = largest >= 0x1p-126f ? largest : 0.0f;
        float reciprocal = largest > 0.0f ? 1.0f / largest : 0.0f;
        for (long i = b * blocksize; i < end; i++) {
            int code = code_of(x[i] * reciprocal);
            packed[i / 2] = i % 2 ? packed[i / 2] | code : code << 4;
        }
    }
    if (n % 2) packed[n / 2] |= 7; /* the code of 0.0 */
}

/* Rules D4-1, D4-2. */
static void dequantize(const unsigned char *packed, const float *absmax, long n, long blocksize, float *y) {
    for (long i = 0; i < n; i++) {
        int code = i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4;
        y[i] = from_bits(VALUE_BITS[code]) * absmax[i / blocksize];
    }
}

struct tensor { char dtype[16]; long n; uint32_t *words; float *floats; };

static struct tensor read_tensor(void) {
    struct tensor t = {.n = 1};
    int dims;
    if (scanf("%15s %d", t.dtype, &dims) != 2) exit(2);
    for (long size; dims-- > 0; t.n *= size)
        if (scanf("%ld", &size) != 1) exit(2);
    t.words = malloc(4 * (t.n + 1)), t.floats = malloc(4 * (t.n + 1));
    for (long i = 0; i < t.n; i++) {
        if (scanf("%x", &t.words[i]) != 1) exit(2);
        t.floats[i] = from_bits(t.words[i]); /* the words of a float32 are its bits */
    }
    return t;
}

static void write_floats(const char *name, int dims, const long *shape, const float *f) {
    long n = 1;
    printf("tensor %s float32 %d", name, dims);
    for (int d = 0; d < dims; d++) printf(" %ld", shape[d]), n *= shape[d];
    for (long i = 0; i < n; i++) printf(" %08x", to_bits(f[i]));
    printf("\n");
}

int main(void) {
    char word[256], id[256] = "", name[64], value[256], type[256] = "", dtype[256] = "";
    long blocksize = 0, shape[8], dims = 0;
    struct tensor given[3] = {{{0}, 0, NULL, NULL}}; /* x, packed, absmax */

    while (scanf("%255s", word) == 1) {
        if (!strcmp(word, "case")) {
            if (scanf("%255s", id) != 1) return 2;
            strcpy(dtype, "float32");
        } else if (!strcmp(word, "param")) {
            if (scanf("%63s %255s", name, value) != 2) return 2;
            if (!strcmp(name, "blocksize")) blocksize = atol(value);
            if (!strcmp(name, "quant_type")) strcpy(type, value);
            if (!strcmp(name, "dtype")) strcpy(dtype, value);
            if (!strcmp(name, "shape")) {
                dims = 0;
                for (char *part = strtok(value, ","); part && dims < 8; part = strtok(NULL, ",")) shape[dims++] = atol(part);
            }
        } else if (!strcmp(word, "tensor")) {
            if (scanf("%63s", name) != 1) return 2;
            struct tensor t = read_tensor();
            given[!strcmp(name, "x") ? 0 : !strcmp(name, "packed") ? 1 : 2] = t;
        } else if (!strcmp(word, "end")) {
            int quantizing = !strncmp(id, "quantize_4bit/", 14);
            printf("case %s\n", id);
            if (strcmp(type, "nf4") || strcmp(dtype, "float32") || (quantizing && strcmp(given[0].dtype, "float32"))) {
                printf("unsupported\n");
            } else if (quantizing) {
                long bytes = (given[0].n + 1) / 2, blocks = (given[0].n + blocksize - 1) / blocksize;
                unsigned char *out = calloc(bytes + 1, 1);
                float *scales = calloc(blocks + 1, 4);
                quantize(given[0].floats, given[0].n, blocksize, out, scales);
                printf("tensor packed uint8 1 %ld", bytes);
                for (long i = 0; i < bytes; i++) printf(" %02x", out[i]);
                printf("\n");
                write_floats("absmax", 1, &blocks, scales);
                free(out), free(scales);
            } else {
                unsigned char *codes = calloc(given[1].n + 1, 1);
                long n = 1;
                for (long d = 0; d < dims; d++) n *= shape[d];
                for (long i = 0; i < given[1].n; i++) codes[i] = given[1].words[i];
                float *y = calloc(n + 1, 4);
                dequantize(codes, given[2].floats, n, blocksize, y);
                write_floats("y", dims, shape, y);
                free(codes), free(y);
            }
            printf("end\n");
            for (struct tensor *t = given; t < given + 3; t++) free(t->words), free(t->floats), memset(t, 0, sizeof *t);
        }
    }
    return 0;
}
