//! `seethrough info`: what images say of themselves, in the words and JSON fields of `qemu-img info`.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};
use serde_json::{Value, json};

use super::figures::{family_human, family_json, figures_human, figures_json};
use super::options::parse_format;
use super::output::{self, OutputFormat};
use super::snapshot_list::{snapshots_human, snapshots_json};
use crate::chain::backing::resolve;
use crate::chain::format::Format;
use crate::chain::host::Locking;
use crate::chain::inspect::{Inspected, Unnamed, inspect, inspect_chain};
use crate::error::{Error, ErrorKind, Result};
use crate::jobs::figures::{Family, FileFigures, family, image_figures};
use crate::qcow2::bitmap::Bitmap;
use crate::qcow2::features::{AutoclearFeatures, CompatibleFeatures, IncompatibleFeatures};
use crate::qcow2::header::{Header, Version};
use crate::qcow2::header_extension::{ExtensionType, SEETHROUGH_EXTENSION};
use crate::qcow2::snapshot_table::Snapshot;
use crate::sys::block_on;
use crate::view::declared::read_declaration;

/// Arguments of `info`.
#[derive(clap::Args)]
pub struct Info {
    /// The image's format; without it, an image that is not qcow2 is shown as raw
    #[arg(short = 'f', long, value_name = "FORMAT", value_parser = parse_format)]
    format: Option<Format>,

    /// How to print
    #[arg(long, value_enum, default_value_t = OutputFormat::Human)]
    output: OutputFormat,

    /// The images behind it, too
    #[arg(long)]
    backing_chain: bool,

    /// Look at an image while others write to it
    #[arg(short = 'U', long)]
    force_share: bool,

    /// The image; of several, the sums are shown too, each file counted once
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
}

impl Info {
    /// Prints what the images say of themselves.
    ///
    /// # Errors
    /// Those of [`inspect_chain`] and [`image_figures`].
    pub fn run(self) -> Result<()> {
        let images = block_on(self.inspect())?;
        let family = (images.len() > 1).then(|| family(images.iter().flat_map(|image| &image.figures)));
        let text = match self.output {
            OutputFormat::Human => human(&images, family.as_ref()),
            OutputFormat::Json => self.json(&images, family.as_ref())?,
        };
        output::print(&text)
    }

    /// The images, each once.
    async fn inspect(&self) -> Result<Vec<ImageInfo>> {
        let locking = if self.force_share {
            Locking::ForceShare
        } else {
            Locking::Lock
        };
        let mut seen = HashSet::new();
        let mut images = Vec::new();
        for file in &self.files {
            let chain = if self.backing_chain {
                inspect_chain(file, self.format, Unnamed::Raw, locking).await?
            } else {
                vec![inspect(file, self.format, Unnamed::Raw, locking).await?]
            };
            for image in chain {
                let figures = image_figures(&image, locking).await?;
                if figures.first().is_some_and(|file| seen.insert(file.id)) {
                    images.push(ImageInfo::of(&image, figures)?);
                }
            }
        }
        Ok(images)
    }

    /// As `qemu-img` prints it where it takes the same arguments: an object for one image, a list for a chain.
    fn json(&self, images: &[ImageInfo], family: Option<&Family>) -> Result<String> {
        let mut values = images.iter().map(serde_json::to_value).collect::<Result<Vec<_>, _>>().map_err(|error| {
            Error::with_source(ErrorKind::Io, "the information does not become JSON", error)
        })?;
        let family = family.map(family_json);
        let value = match (self.files.len(), self.backing_chain) {
            (1, false) => values.pop().unwrap_or_default(),
            (1, true) => {
                if let (Some(top), Some(family)) = (values.first_mut().and_then(Value::as_object_mut), family) {
                    top.insert("family".to_owned(), family);
                }
                values.into()
            }
            _ => json!({ "images": values, "family": family }),
        };
        Ok(format!("{value:#}\n"))
    }
}

fn human(images: &[ImageInfo], family: Option<&Family>) -> String {
    let mut texts: Vec<String> = images.iter().map(ImageInfo::human).collect();
    if let Some(family) = family {
        let mut text = String::new();
        family_human(family, &mut |name, value| push_line(&mut text, name, value));
        texts.push(text);
    }
    texts.join("\n")
}

/// Appends a line; what comes from an image cannot forge further lines.
fn push_line(text: &mut String, name: &str, value: &str) {
    let plain = |c: char| if c.is_control() { '?' } else { c };
    text.extend(name.chars().map(plain));
    text.push(':');
    if !value.is_empty() {
        text.push(' ');
    }
    text.extend(value.chars().map(plain));
    text.push('\n');
}

/// One image, with the field names of QEMU's `ImageInfo`.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct ImageInfo {
    filename: String,
    format: &'static str,
    virtual_size: u64,
    actual_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    encrypted: Option<bool>,
    dirty_flag: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    full_backing_filename: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename_format: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty", serialize_with = "serialize_snapshots")]
    snapshots: Vec<Snapshot>,
    #[serde(skip_serializing_if = "Option::is_none")]
    format_specific: Option<FormatSpecific>,
    /// The declaration of regions, which is ours alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    seethrough: Option<Value>,
    /// The room that it takes on the host, with more than QEMU tells.
    #[serde(serialize_with = "serialize_figures")]
    figures: Vec<FileFigures>,
}

fn serialize_figures<S: Serializer>(files: &[FileFigures], serializer: S) -> Result<S::Ok, S::Error> {
    figures_json(files).serialize(serializer)
}

fn serialize_snapshots<S: Serializer>(snapshots: &[Snapshot], serializer: S) -> Result<S::Ok, S::Error> {
    snapshots_json(snapshots).serialize(serializer)
}

#[derive(Serialize)]
struct FormatSpecific {
    #[serde(rename = "type")]
    format: &'static str,
    data: Qcow2Specific,
}

/// A bitmap, with the field names of QEMU's `Qcow2BitmapInfo`.
#[derive(Serialize)]
struct BitmapInfo {
    flags: Vec<&'static str>,
    name: String,
    granularity: u64,
}

impl BitmapInfo {
    fn of(bitmap: &Bitmap) -> Self {
        let flags = [(bitmap.is_in_use, "in-use"), (bitmap.is_auto, "auto")];
        Self {
            flags: flags.into_iter().filter_map(|(set, name)| set.then_some(name)).collect(),
            name: bitmap.name.clone(),
            granularity: bitmap.granularity,
        }
    }

    fn human(&self, line: &mut impl FnMut(&str, &str)) {
        line("            flags", "");
        for (number, flag) in self.flags.iter().enumerate() {
            line(&format!("                [{number}]"), flag);
        }
        line("            name", &self.name);
        line("            granularity", &self.granularity.to_string());
    }
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Qcow2Specific {
    compat: &'static str,
    compression_type: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    lazy_refcounts: Option<bool>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    bitmaps: Vec<BitmapInfo>,
    refcount_bits: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_file: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_file_raw: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    corrupt: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    extended_l2: Option<bool>,
}

impl ImageInfo {
    fn of(image: &Inspected, figures: Vec<FileFigures>) -> Result<Self> {
        let info = Self {
            filename: image.path.display().to_string(),
            format: image.format.name(),
            virtual_size: image.virtual_size,
            actual_size: figures.first().map_or(0, |file| file.allocation),
            cluster_size: None,
            encrypted: None,
            dirty_flag: false,
            backing_filename: None,
            full_backing_filename: None,
            backing_filename_format: None,
            snapshots: image.snapshots.clone(),
            format_specific: None,
            seethrough: None,
            figures,
        };
        Ok(match &image.header {
            Some(header) => info.with_header(&image.path, header, &image.bitmaps),
            // A raw image declares its regions in a file beside it.
            None => Self {
                seethrough: read_declaration(&image.path, None)?
                    .map(|found| found.to_bytes())
                    .transpose()?
                    .map(|bytes| declaration(&bytes)),
                ..info
            },
        })
    }

    fn with_header(self, path: &Path, header: &Header, bitmaps: &[Bitmap]) -> Self {
        let name = header.backing_file.as_ref();
        let full = name.and_then(|name| resolve(path, name).ok());
        Self {
            cluster_size: Some(header.cluster_size()),
            encrypted: (header.crypt_method != 0).then_some(true),
            dirty_flag: header
                .incompatible_features
                .contains(IncompatibleFeatures::DIRTY),
            backing_filename: name.map(|name| name.to_string_lossy().into_owned()),
            full_backing_filename: full.map(|path| path.display().to_string()),
            backing_filename_format: header
                .backing_format()
                .map(|format| format.to_string_lossy().into_owned()),
            format_specific: Some(FormatSpecific {
                format: "qcow2",
                data: Qcow2Specific::of(header, bitmaps),
            }),
            seethrough: header.extension(SEETHROUGH_EXTENSION).map(declaration),
            ..self
        }
    }

    fn human(&self) -> String {
        let mut text = String::new();
        let size = format!(
            "{} ({} bytes)",
            output::human_size(self.virtual_size),
            self.virtual_size
        );
        let mut line = |name: &str, value: &str| push_line(&mut text, name, value);
        line("image", &self.filename);
        line("file format", self.format);
        line("virtual size", &size);
        line("disk size", &output::human_size(self.actual_size));
        if self.encrypted.is_some() {
            line("encrypted", "yes");
        }
        if let Some(cluster_size) = self.cluster_size {
            line("cluster_size", &cluster_size.to_string());
        }
        if self.dirty_flag {
            line("cleanly shut down", "no");
        }
        if let Some(name) = &self.backing_filename {
            match &self.full_backing_filename {
                Some(full) if full != name => {
                    line("backing file", &format!("{name} (actual path: {full})"));
                }
                _ => line("backing file", name),
            }
        }
        if let Some(format) = &self.backing_filename_format {
            line("backing file format", format);
        }
        text.push_str(&snapshots_human(&self.snapshots));
        let mut line = |name: &str, value: &str| push_line(&mut text, name, value);
        if let Some(specific) = &self.format_specific {
            line("Format specific information", "");
            specific.data.human(&mut line);
        }
        if let Some(declaration) = &self.seethrough {
            line("seethrough", &declaration.to_string());
        }
        figures_human(&self.figures, &mut line);
        text
    }
}

impl Qcow2Specific {
    fn of(header: &Header, bitmaps: &[Bitmap]) -> Self {
        let v3 = header.version == Version::V3;
        let compatible = header.compatible_features;
        let incompatible = header.incompatible_features;
        let external = incompatible.contains(IncompatibleFeatures::EXTERNAL_DATA_FILE);
        let data_file = header.extension(ExtensionType::EXTERNAL_DATA_FILE_NAME);
        Self {
            compat: if v3 { "1.1" } else { "0.10" },
            compression_type: header.compression_type.name(),
            lazy_refcounts: v3.then(|| compatible.contains(CompatibleFeatures::LAZY_REFCOUNTS)),
            bitmaps: bitmaps.iter().map(BitmapInfo::of).collect(),
            refcount_bits: header.refcount_bits(),
            data_file: data_file
                .filter(|_| external)
                .map(|name| String::from_utf8_lossy(name).into_owned()),
            data_file_raw: external.then(|| {
                header
                    .autoclear_features
                    .contains(AutoclearFeatures::RAW_EXTERNAL_DATA)
            }),
            corrupt: v3.then(|| incompatible.contains(IncompatibleFeatures::CORRUPT)),
            extended_l2: v3.then(|| header.has_extended_l2()),
        }
    }

    fn human(&self, line: &mut impl FnMut(&str, &str)) {
        line("    compat", self.compat);
        line("    compression type", self.compression_type);
        if let Some(lazy) = self.lazy_refcounts {
            line("    lazy refcounts", &lazy.to_string());
        }
        if !self.bitmaps.is_empty() {
            line("    bitmaps", "");
        }
        for (number, bitmap) in self.bitmaps.iter().enumerate() {
            line(&format!("        [{number}]"), "");
            bitmap.human(line);
        }
        line("    refcount bits", &self.refcount_bits.to_string());
        if let Some(data_file) = &self.data_file {
            line("    data file", data_file);
        }
        if let Some(raw) = self.data_file_raw {
            line("    data file raw", &raw.to_string());
        }
        if let Some(corrupt) = self.corrupt {
            line("    corrupt", &corrupt.to_string());
        }
        if let Some(extended) = self.extended_l2 {
            line("    extended l2", &extended.to_string());
        }
    }
}

/// Our extension as JSON, or what there is instead as a string.
fn declaration(data: &[u8]) -> Value {
    serde_json::from_slice(data)
        .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(data).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_from_an_image_cannot_forge_lines() {
        let mut header = Header::new(Version::V3, 16, 1 << 20);
        header.backing_file = Some("a\nencrypted".into());
        let image = Inspected {
            path: "/dev/null".into(),
            format: Format::Qcow2,
            snapshots: Vec::new(),
            bitmaps: Vec::new(),
            virtual_size: 1 << 20,
            header: Some(header.with_extension(SEETHROUGH_EXTENSION, b"no JSON".to_vec())),
        };
        let text = ImageInfo::of(&image, Vec::new()).unwrap().human();
        assert!(text.contains("backing file: a?encrypted (actual path"), "{text}");
        assert!(text.contains("    extended l2: false\n"), "{text}");
        assert!(text.contains("seethrough: \"no JSON\"\n"), "{text}");
    }
}
