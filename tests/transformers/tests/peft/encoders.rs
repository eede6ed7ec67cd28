//! Encoders of text, with padding.

use crate::{case, check, ids, Case, Forward};

#[test]
fn encoders() {
    check(&[
        case!("bert", |vb, config, x| {
            let (input, mask) = (ids(x, "input_ids")?, ids(x, "attention_mask")?);
            let model = models::bert::BertModel::load(vb, &config.get()?)?;
            model.forward(&input, &input.zeros_like()?, Some(&mask))
        }),
        case!("distilbert", |vb, config, x| {
            // candle's mask is true where a token is padding.
            let padding = x["attention_mask"].eq(0i64)?.unsqueeze(1)?.unsqueeze(1)?;
            let model = models::distilbert::DistilBertModel::load(vb, &config.get()?)?;
            model.forward(&ids(x, "input_ids")?, &padding)
        }),
        case!("modernbert", |vb, config, x| {
            let model = models::modernbert::ModernBertForMaskedLM::load(vb, &config.get()?)?;
            model.forward(&ids(x, "input_ids")?, &ids(x, "attention_mask")?)
        }),
    ]);
}
