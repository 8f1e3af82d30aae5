/* Reads the conformance vectors: `cc -o read_vectors read_vectors.c && ./read_vectors FOLDER OPERATION < LINES`.
 * A line asks for a tensor, as `quantize_4bit/nf4-size-1 inputs x`; the answer is its dtype, its shape, and its bytes in hexadecimal.
 * The files never change, so that a search for text takes the place of a parser of JSON. Little-endian machines only.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char *read_file(const char *folder, const char *operation, const char *kind) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s.%s", folder, operation, kind);
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END)) { perror(path); exit(1); }
    long size = ftell(file);
    char *data = calloc(size + 1, 1);
    rewind(file);
    if (!data || fread(data, 1, size, file) != (size_t)size) { perror(path); exit(1); }
    fclose(file);
    return data;
}

/* ten lines */
struct tensor { char dtype[8], shape[64]; const char *bytes; long size; };
static const char *after(const char *text, const char *format, const char *name) {
    char mark[256];
    snprintf(mark, sizeof mark, format, name);
    return (text = strstr(text, mark)) ? text + strlen(mark) : (fprintf(stderr, "no %s\n", mark), exit(1), text);
}
static struct tensor find(const char *json, const char *data, const char *id, const char *part, const char *name) {
    const char *at = after(after(after(json, "\"id\": \"%s\"", id), "\"%s\": {", part), "\"%s\": ", name);
    char key[16], *entry; uint64_t header; long first, last; struct tensor found = {0};
    sscanf(strstr(at, "\"t"), "\"%15[^\"]", key), memcpy(&header, data, 8), entry = (char *)after(data + 8, "\"%s\":", key);
    sscanf(entry, "{\"dtype\":\"%7[^\"]\",\"shape\":[%63[^]]", found.dtype, found.shape); /* no shape: a scalar */
    sscanf(after(entry, "\"data_offsets\":[", ""), "%ld,%ld", &first, &last);
    return found.bytes = data + 8 + header + first, found.size = last - first, found;
}
/* end */

int main(int argc, char **argv) {
    if (argc != 3) return fprintf(stderr, "read_vectors FOLDER OPERATION\n"), 2;
    const char *json = read_file(argv[1], argv[2], "json"), *data = read_file(argv[1], argv[2], "safetensors");
    char id[128], part[16], name[32];
    while (scanf("%127s %15s %31s", id, part, name) == 3) {
        struct tensor found = find(json, data, id, part, name);
        printf("%s %s ", found.dtype, found.shape);
        for (long i = 0; i < found.size; i++) printf("%02x", (unsigned char)found.bytes[i]);
        printf("\n");
    }
    return 0;
}
